"""What is unusual in a model, read off its config: the words of the support table."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
STATES = {"conv": "convolution", "linear_attention": "recurrence", "hybrid": "recurrence beside attention", "mamba": "recurrence"}
LAYERS = {
    "sliding_attention": "sliding window",
    "chunked_attention": "chunked",
    "indexed_attention": "sparse, indexed",
    "compressed_sparse_attention": "sparse, compressed",
    "heavily_compressed_attention": "compressed",
    "hybrid_sliding": "sliding window beside recurrence",
    **STATES,
}


def features(config: PreTrainedConfig) -> list[str]:
    """Return the attention's kind first, then what else sets the model apart."""
    table: Any = copy.copy(config.get_text_config(decoder=True))
    # What differs between layers is read as the config's own value: a word for the table, not a size to build with.
    table.allow_global_per_layer_attribute_access = True
    return [*_attention(table), *_layers(table), *_others(table)]


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _attention(config: Any) -> list[str]:
    heads, groups = _first(config, HEADS), _first(config, KV_HEADS)
    if getattr(config, "kv_lora_rank", None):
        return ["MLA"]
    if getattr(config, "multi_query", False) or groups == 1:
        return ["MQA"]
    if heads is None:
        return []
    return ["GQA" if groups and groups < heads else "MHA"]


def _layers(config: Any) -> list[str]:
    kinds = set(getattr(config, "layer_types", None) or ())
    found = [word for kind, word in LAYERS.items() if kind in kinds]
    window = isinstance(getattr(config, "sliding_window", None), int) and getattr(config, "use_sliding_window", True)
    if window and not kinds:
        found.append("sliding window")
    if getattr(config, "num_kv_shared_layers", 0):
        found.append("KV shared across layers")
    return found


def _others(config: Any) -> list[str]:
    found = []
    experts, chosen = _first(config, EXPERTS), _first(config, CHOSEN)
    if experts and chosen:
        found.append(f"top {chosen} of {experts} experts")
    if any(getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap")):
        found.append("softcap")
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        found.append("ALiBi")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(group.get("rope_type", "default")) for group in (rope, *rope.values()) if isinstance(group, dict)} - {"default"}
    found += [f"RoPE {kind}" for kind in sorted(kinds)]
    return found
