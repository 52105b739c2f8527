"""Tiny random causal LMs that can show a fault: sharp attention, spread norms and biases, every layer kind kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
