"""Puts the semantic operators into a transformers model while it is traced, through its public extension points.

::

    AttentionInterface        attention of a layer          -> calque::attention
    AttentionMaskInterface    create_*_mask                 -> calque::attention_mask
    Cache                     past_key_values.update        -> calque::cache_update
    ExpertsInterface          experts of a mixture layer    -> every expert on every token, weighted (plain ATen)

Source: transformers/masking_utils.py, cache_utils.py, integrations/moe.py @5.23.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import masking_utils as masks
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import AttentionInterface

from calque import ops

NAME = "calque"
# For attention that is the model's own code: the same mask, to be added to its scores.
ADDED = "calque_added"

# Which meaning a mask has is said by the function that a model calls to make it. Its local size is the window.
_KINDS: dict[CodeType, str] = {
    masks.create_causal_mask.__code__: "causal",
    masks.create_sliding_window_causal_mask.__code__: "sliding",
    masks.create_chunked_causal_mask.__code__: "chunked",
    masks.create_bidirectional_mask.__code__: "bidirectional",
    masks.create_bidirectional_sliding_window_mask.__code__: "custom",
}
# What a model lays over the mask, in the order in which transformers does.
_OVERLAYS = ("or_mask_function", "and_mask_function", "block_sequence_ids")


def semantic_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention of one layer as one operator, [B, Q, H, Dv], and no weights.

    A bias by position has no place in the operator: such attention (T5's) is written out.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        # A mask that the model made itself, to be added to the scores.
        position_bias, attention_mask = attention_mask if position_bias is None else attention_mask + position_bias, None
    if position_bias is not None:
        return _biased_attention(query, key, value, attention_mask, scale, position_bias).transpose(1, 2).contiguous(), None
    out = torch.ops.calque.attention(query, key, value, attention_mask, scale, float(softcap or 0.0), s_aux, causal)
    return out.transpose(1, 2).contiguous(), None


def _biased_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, bias: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) * scale + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ value


def mask_kind() -> str:
    """Return the kind of the mask that is being made; ``custom`` where the model lays a function of its own over it."""
    kind, overlays = _meaning()
    return "custom" if overlays else kind


def _meaning() -> tuple[str, dict[str, Any]]:
    """Return the kind of mask that is being made, and what is laid over it.

    Read off the calling ``create_*_mask``, found by its code object: the mask interface is told only the functions.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _KINDS:
            overlays = {name: laid for name in _OVERLAYS if (laid := frame.f_locals.get(name)) is not None}
            return _KINDS[frame.f_code], overlays
        frame = frame.f_back
    return "custom", {}


def semantic_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masks.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Return the mask of one kind of layer, bool [B, 1, Q, K], as one operator that says what it means; None where all is seen."""
    (kind, overlays), window = _meaning(), int(local_size or 0)
    if attention_mask is None and kind == "bidirectional" and not overlays:
        return None  # as transformers does for its fused kernels: patches of an image all see each other
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)

    def by_slot(function: Callable[..., Any]) -> Tensor:
        mask = masks.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=False, device=device,
        )  # fmt: skip
        assert mask is not None  # only its skips give none
        return mask

    if kind == "custom":
        full = by_slot(mask_function)
    else:
        full = ops.visible(attention_mask, q_offset, q_length, kv_length, kind, window)
        for name, laid in overlays.items():
            over = by_slot(masks.blockwise_overlay(laid) if name == "block_sequence_ids" else laid)
            full = full & over if name == "and_mask_function" else full | over
    window = window if kind == "sliding" or not overlays else 0
    masked: Tensor = torch.ops.calque.attention_mask(full, attention_mask, "custom" if overlays else kind, window)
    return masked


def added_mask(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """Return the mask of one kind of layer as what is added to scores: 0, or the lowest number where a key is hidden."""
    mask = semantic_mask(**kwargs)
    return None if mask is None else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def all_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the mixture, [T, H], computed as every expert on every token, weighted by its routing weight or zero.

    transformers loops over the experts that were hit, which no graph can; this is exact and has no data-dependent shape.
    """
    experts = torch.arange(module.num_experts, device=hidden_states.device)
    chosen = top_k_index.unsqueeze(-1) == experts
    routing = (chosen.to(top_k_weights.dtype) * top_k_weights.unsqueeze(-1)).sum(1)  # [T, E]

    def project(inputs: Tensor, name: str) -> Tensor:
        weight: Tensor = getattr(module, name)
        out = torch.matmul(inputs, weight if module.is_transposed else weight.transpose(1, 2))
        bias: Tensor | None = getattr(module, f"{name}_bias") if module.has_bias else None
        return out if bias is None else out + bias.unsqueeze(1)

    if module.has_gate:
        inner = module._apply_gate(project(hidden_states.unsqueeze(0), "gate_up_proj"))
    else:
        inner = module.act_fn(project(hidden_states.unsqueeze(0), "up_proj"))
    out = project(inner, "down_proj")  # [E, T, H]
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    mixed: Tensor = (out * routing.transpose(0, 1).unsqueeze(-1)).sum(0)
    return mixed.to(hidden_states.dtype).contiguous()


class RecordingCache(DynamicCache):
    """Holds nothing and remembers which layers asked for a cache, with which heads and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[int, int, int]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values as they came."""
        self.seen[layer_idx] = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return that nothing was seen before."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the lengths of an empty cache."""
        return query_length, 0


class TracedCache(RecordingCache):
    """Adds to abstract state placeholders through ``calque::cache_update``; which layout that becomes is a pass's to say."""

    def __init__(self, layers: Sequence[int], past: Sequence[Tensor]) -> None:
        super().__init__()
        self.keys = dict(zip(layers, past[0::2], strict=True))
        self.values = dict(zip(layers, past[1::2], strict=True))
        self.length = past[0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the whole keys and values of a layer."""
        update = torch.ops.calque.cache_update
        return (
            update(self.keys[layer_idx], key_states, f"{layer_idx}.key"),
            update(self.values[layer_idx], value_states, f"{layer_idx}.value"),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the symbol ``past_sequence_length``, which all layers share."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length of past and new together, from slot 0."""
        return self.length + query_length, 0


def register() -> None:
    """Make ``attn_implementation="calque"``, the mask of ``calque_added`` and ``experts_implementation="calque"`` known to transformers."""
    AttentionInterface.register(NAME, semantic_attention)
    masks.AttentionMaskInterface.register(NAME, semantic_mask)
    masks.AttentionMaskInterface.register(ADDED, added_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, all_experts)
