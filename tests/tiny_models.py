"""Tiny random causal LMs that can show a fault: sharp attention, spread norms and biases, every layer kind kept."""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calque.converters import causal_lm
from calque.random_weights import write_random_weights
from calque.source import ModelSource
from calque.traced import TracedModel
from calque.traced_session import TracedSession

VOCABULARY = 211


@dataclass(frozen=True)
class Tiny:
    """The shape of a model; ``extra`` goes into its config as it is."""

    model_type: str
    layers: int = 2
    hidden: int = 64
    intermediate: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    vocabulary: int = VOCABULARY
    extra: dict[str, Any] = field(default_factory=dict)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

TINY = {
    "llama": Tiny("llama"),
    "qwen3": Tiny("qwen3"),
    "gemma2": Tiny("gemma2", extra={"sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3_text": Tiny("gemma3_text", layers=3, extra={"sliding_window": 8, "query_pre_attn_scalar": 24,
                        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": Tiny("gpt2", extra={"n_positions": 64}),
    "mixtral": Tiny("mixtral", extra={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "phi3": Tiny("phi3", head_dim=16, extra={"max_position_embeddings": 64, "original_max_position_embeddings": 16,
                 "rope_parameters": LONGROPE, "pad_token_id": 0}),
}  # fmt: skip

SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 32}  # fmt: skip

# The types that every release converts: each keeps every kind of layer it has, and caps and windows that bite.
TYPES = {
    "llama": TINY["llama"],
    "mistral": Tiny("mistral", extra={"sliding_window": 8}),
    "qwen2": Tiny("qwen2", extra={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": TINY["qwen3"],
    "mixtral": TINY["mixtral"],
    "qwen3_moe": Tiny("qwen3_moe", extra={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}),
    "gemma2": replace(TINY["gemma2"], extra={**TINY["gemma2"].extra, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3_text": TINY["gemma3_text"],
    "phi3": Tiny("phi3", head_dim=16, extra={"sliding_window": 8, "pad_token_id": 0}),
    "phi3-longrope": replace(TINY["phi3"], extra={**TINY["phi3"].extra, "max_position_embeddings": 128,
                             "original_max_position_embeddings": 32,
                             "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}}),
    "gpt2": TINY["gpt2"],
    "gpt_neox": Tiny("gpt_neox", head_dim=16, extra={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                     "partial_rotary_factor": 0.5}}),
    "gpt_oss": Tiny("gpt_oss", extra={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                    "layer_types": SLIDING_AND_FULL, "rope_parameters": YARN}),
    "bloom": Tiny("bloom"),
}  # fmt: skip


def config_of(tiny: Tiny) -> Any:
    fields = {
        "vocab_size": tiny.vocabulary,
        "hidden_size": tiny.hidden,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if tiny.model_type != "gpt2":
        fields |= {"intermediate_size": tiny.intermediate, "num_key_value_heads": tiny.kv_heads, "head_dim": tiny.head_dim}
        fields |= {"max_position_embeddings": 128}
    config = CONFIG_MAPPING[tiny.model_type](**fields | tiny.extra)
    config._attn_implementation = "eager"
    return config


def eager_model(tiny: Tiny, seed: int = 0, sharpness: float = 1.6) -> PreTrainedModel:
    """The model's weights are random, its attention sharp: matrices N(0, 1/fan_in), queries and keys ``sharpness`` times that."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(tiny), attn_implementation="eager")  # type: ignore[no-untyped-call]
    model.train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # A norm of queries or keys undoes the gain of their projection, so it carries the gain itself.
                parameter.add_(noise * 0.2 + (sharpness - 0.6 if "q_norm" in name or "k_norm" in name else 0.0))
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            fan_in = parameter.shape[0] if isinstance(owner, Conv1D) else parameter.shape[-1]
            gain = sharpness if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn")) else 1.0
            # An embedding that is also the head must not drown what the layers add (gemma multiplies it by √hidden).
            alone = isinstance(owner, torch.nn.Embedding) and not model.config.tie_word_embeddings
            scale = 1.0 if alone else gain / math.sqrt(fan_in)
            parameter.copy_(noise * scale)
    return model


def save_random(tiny: Tiny, folder: Path) -> Path:
    """The folder holds the config and random weights of a checkpoint."""
    config = config_of(tiny)
    config.save_pretrained(folder)
    write_random_weights(config, folder)
    return folder


@cache
def source_of(tiny_name: str) -> ModelSource:
    """The source of a checkpoint with random weights, written once a process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return ModelSource.resolve(str(save_random(TYPES[tiny_name], folder)), scratch=folder)


@cache
def shared_trace(tiny_name: str) -> TracedModel:
    """The trace that all tests of a process share: to be copied, not rewritten."""
    return causal_lm.trace(source_of(tiny_name))


def traced(tiny_name: str) -> TracedModel:
    """A trace of its own to rewrite; tracing itself happens once a process."""
    return shared_trace(tiny_name).copy()


_TRACES: dict[str, TracedModel] = {}


def traced_as(tiny: Tiny) -> TracedModel:
    """A trace of its own of a model that is not among those of every release, traced once a process."""
    for name, same in TYPES.items():
        if same == tiny:
            return traced(name)
    if repr(tiny) not in _TRACES:
        folder = Path(tempfile.mkdtemp(prefix="tiny-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _TRACES[repr(tiny)] = causal_lm.trace(ModelSource.resolve(str(save_random(tiny, folder)), scratch=folder))
    return _TRACES[repr(tiny)].copy()


def prompt(model: TracedModel, length: int = 5) -> dict[str, NDArray[Any]]:
    """Two rows of seeded tokens and an empty cache."""
    ids = np.random.default_rng(11).integers(3, VOCABULARY, (2, length))
    inputs: dict[str, NDArray[Any]] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(length), ids.shape).copy(),
    }
    for state in model.states:
        inputs[state.input] = np.zeros((2, int(state.shape[1]), 0, int(state.shape[3])), dtype=np.float32)
    return inputs


def answers(model: TracedModel, inputs: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """What the graph gives, by name."""
    return dict(TracedSession(model)("model", inputs))
