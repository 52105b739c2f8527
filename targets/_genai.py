"""genai_config.json: what onnxruntime-genai reads beside a causal language model. Shared by the targets that speak ONNX.

Source: the keys are those that the builder of onnxruntime-genai 0.18 writes, the types those that its runtime lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.artifact import NUM_LOGITS_TO_KEEP, Artifact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig

    from calque.states import StateSpec

FILE = "genai_config.json"
VERSION = "0.18"

# transformers' model type: the runtime's. Each is loaded and compared in tests/ecosystem/test_genai.py.
TYPES = {
    "ernie4_5": "ernie4_5",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gpt_oss": "gptoss",
    "granite": "granite",
    "hunyuan_v1_dense": "hunyuandensev1",
    "llama": "llama",
    "mistral": "mistral",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "phi": "phi",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}

# What a generation_config.json may set, and genai's own defaults.
SEARCH: dict[str, Any] = {
    "do_sample": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def write(artifact: Artifact, config: PreTrainedConfig) -> list[str]:
    """Leave genai_config.json in the artifact where onnxruntime-genai can run it; return what the user should know of it."""
    if not artifact.states:
        return []
    text = config.get_text_config()
    generation = _generation(artifact.folder)
    if reason := obstacle(artifact, text, generation):
        return [f"There is no {FILE}, so onnxruntime-genai {VERSION} cannot load this artifact: {reason}."]
    data = genai_config(artifact, text, generation)
    (artifact.folder / FILE).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if artifact.limits.recompute_at is None:
        return []
    return [
        f"{FILE} ends the context at {artifact.limits.recompute_at} tokens: the rotary frequencies of earlier keys change there, "
        f"and onnxruntime-genai {VERSION} would go on with its cache."
    ]


def obstacle(artifact: Artifact, config: Any, generation: dict[str, Any]) -> str:
    """Return why onnxruntime-genai cannot run the artifact rightly, or nothing."""
    [graph] = artifact.graphs.values()
    if config.model_type not in TYPES:
        return f"it does not know models of type {config.model_type}"
    if reason := _states_obstacle(artifact.states):
        return reason
    if any(tensor.name == NUM_LOGITS_TO_KEEP for tensor in graph.inputs):
        return f"it does not give the input {NUM_LOGITS_TO_KEEP}, which --logits dynamic adds"
    if artifact.recipe.get("logits") == "last":
        return "it pads rows on the right and reads the logits of each row's last token, which --logits last may leave out"
    if artifact.limits.padding == "none":
        return "it pads rows of different length, which this model cannot be given"
    if not _ends(config, generation):
        return "neither generation_config.json nor config.json names an end token"
    return ""


def _states_obstacle(states: Sequence[StateSpec]) -> str:
    """Return why onnxruntime-genai cannot carry the states, or nothing."""
    if any(state.update == "in_place" for state in states):
        return "it does not give write_indices, which says where a static cache is written"
    if any(state.kind not in ("key", "value") for state in states):
        return "the model has states besides keys and values"
    if [state.layer for state in states] != [layer for layer in range(len(states) // 2) for _ in "kv"]:
        return "some layers have no keys and values of their own"
    if states[0].dtype == "bfloat16":
        return "no kernel of ONNX Runtime's CPU takes its keys and values, so nobody has tried it"
    if len({tuple(state.shape) for state in states}) > 1:
        return "its layers differ in heads or head size"
    return ""


def genai_config(artifact: Artifact, config: Any, generation: dict[str, Any]) -> dict[str, Any]:
    """Return the whole of genai_config.json; sizes of the cache are those of the graph."""
    [graph] = artifact.graphs.values()
    _, kv_heads, _, head_size = artifact.states[0].shape
    ends = _ends(config, generation)
    limits = (artifact.limits.max_length, artifact.limits.recompute_at, getattr(config, "max_position_embeddings", None))
    context = min(limit for limit in limits if limit)
    fed = {tensor.name for tensor in graph.inputs}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in fed}
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph.file,
        "head_size": head_size,
        "hidden_size": config.hidden_size,
        "inputs": {**inputs, "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(artifact.states) // 2,
        "num_key_value_heads": kv_heads,
    }
    begin, padding = (_first(name, generation, config) for name in ("bos_token_id", "pad_token_id"))
    model: dict[str, Any] = {
        "bos_token_id": ends[0] if begin is None else begin,
        "context_length": context,
        "decoder": decoder,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        # Rows are padded with it and masked where it stands; a model without one is padded with what ends a text.
        "pad_token_id": ends[0] if padding is None else padding,
        "type": TYPES[config.model_type],
        "vocab_size": config.vocab_size,
    }
    search: dict[str, Any] = {name: default if generation.get(name) is None else generation[name] for name, default in SEARCH.items()}
    # Standard Attention appends to the past and gives back a new present: no buffer is shared between the two.
    search |= {"early_stopping": True, "max_length": context, "past_present_share_buffer": False}
    return {"model": model, "search": dict(sorted(search.items()))}


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    data: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return data if isinstance(data, dict) else {}


def _first(name: str, generation: dict[str, Any], config: Any) -> Any:
    value = generation.get(name)
    return getattr(config, name, None) if value is None else value


def _ends(config: Any, generation: dict[str, Any]) -> list[int]:
    value = _first("eos_token_id", generation, config)
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
