"""What upstream computes from cache slots, computed from true positions: padding takes none, wherever it lies.

A model whose forward takes ``position_ids`` needs nothing of this. The others count slots somewhere inside; there, the
positions and the mask of the call being traced are read from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calque import ops


@dataclass(frozen=True)
class Rows:
    """The call being traced: ``positions`` of its tokens, int64 [B, S], and ``mask`` over past and new, int64 [B, P + S]."""

    positions: Tensor
    mask: Tensor


_ROWS: ContextVar[Rows] = ContextVar("rows")


@contextmanager
def known(positions: Tensor, mask: Tensor) -> Iterator[None]:
    """Make the call's positions and mask known to patched modules inside the block."""
    token = _ROWS.set(Rows(positions, mask))
    try:
        yield
    finally:
        _ROWS.reset(token)


def counts_slots(module: nn.Module) -> bool:
    """Return whether the module is a table of positions that is read at ``past_key_values_length`` and on."""
    parameters = inspect.signature(type(module).forward).parameters
    # With a mask among them (OPT), positions are counted from it. RoFormer's table is not added but turns queries and keys.
    others = "attention_mask" in parameters or type(module).__name__.startswith("RoFormer")
    return isinstance(module, nn.Embedding) and "past_key_values_length" in parameters and not others


def table_forward(module: Any, *_: Any, **__: Any) -> Tensor:
    """Return the rows of the table at the call's positions, [B, S, H]."""
    return nn.functional.embedding(_ROWS.get().positions + getattr(module, "offset", 0), module.weight)


def grows(module: nn.Module) -> bool:
    """Return whether the module is a table of sines that is made anew, longer, when a call reaches its end."""
    return hasattr(module, "make_weights") and isinstance(getattr(module, "weights", None), Tensor)


def fixed_table_forward(module: Any, *_: Any, **__: Any) -> Tensor:
    """Return the rows of the table, as long as it is, at the call's positions, [B, S, H]."""
    return nn.functional.embedding(_ROWS.get().positions + module.offset, module.weights)


def starts_after_padding_index(module: nn.Module) -> bool:
    """Return whether the module embeds tokens and counts positions from ``padding_idx + 1`` when it is given none."""
    return hasattr(module, "create_position_ids_from_input_ids") and isinstance(getattr(module, "padding_idx", None), int)


def offset_forward(module: Any, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Return the embeddings for positions that count from 0, [B, S, H]."""
    positions = None if position_ids is None else position_ids + module.padding_idx + 1
    embedded: Tensor = type(module).forward(module, *args, position_ids=positions, **kwargs)
    return embedded


def tunes_temperature(module: nn.Module) -> bool:
    """Return whether the module is an attention that scales its queries by position."""
    return type(module).__name__ == "Llama4TextAttention" and bool(module.attn_temperature_tuning) and not module.use_rope


def temperature_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the attention with its queries, which no rotary embedding turns, scaled by the call's positions."""
    steps = torch.floor((_ROWS.get().positions.float() + 1.0) / module.floor_scale)
    scales = (torch.log1p(steps) * module.attn_scale + 1.0).unsqueeze(-1)
    project = module.q_proj.forward
    module.attn_temperature_tuning = False
    module.q_proj.forward = lambda hidden: project(hidden) * scales
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        module.attn_temperature_tuning = True
        module.q_proj.forward = project


def alibi_forward(
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return MPT's attention, [B, S, H], with the distance of each key counted in tokens."""
    batch, length = hidden_states.shape[:2]
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (part.reshape(batch, length, module.n_heads, module.head_dim).transpose(1, 2) for part in mixed.chunk(3, dim=2))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    # Upstream's table falls by one slope for each slot. Softmax does not see what is added to a whole row of scores.
    slopes = (position_bias[:, 0, -1] - position_bias[:, 0, -2])[None, :, None, None]
    places = _ROWS.get().mask.cumsum(1)
    distance = (places - places[:, -1:])[:, None, None, :].to(query.dtype)
    scores = torch.matmul(query, key.transpose(-1, -2)) * module.softmax_scale + slopes * distance
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask, torch.finfo(query.dtype).min)
    weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
    context = torch.matmul(weights, value).permute(0, 2, 1, 3).reshape(batch, length, -1)
    return module.out_proj(context), weights


def local_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
    """Return GPT-Neo's attention of one layer, [B, H, S, D], unscaled as it is trained, its window counted in tokens."""
    kind, window = ("sliding", int(module.config.window_size)) if module.attention_type == "local" else ("causal", 0)
    key_mask = _ROWS.get().mask.to(torch.bool)
    queries, keys = query.shape[2], key.shape[2]
    full = ops.visible(key_mask, keys - queries, queries, keys, kind, window)
    mask = torch.ops.calque.attention_mask(full, key_mask, kind, window)
    out: Tensor = torch.ops.calque.attention(query, key, value, mask, 1.0, 0.0, None, True)
    return out, None
