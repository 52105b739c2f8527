"""The semantic operators: what a graph means, kept whole until a target decides how to say it.

Each has a fake (shapes), a reference implementation (any stage runs in ``torch.fx.Interpreter``) and a decomposition
to ATen, which here is one and the same function: the reference is written in plain tensor operations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(key_mask: Tensor, past: int, queries: int, keys: int, kind: str, window: int) -> Tensor:
    """Return which keys each query may see, by true positions: bool [B, 1, Q, K].

    Padding takes no position, so a row is masked as if it stood alone, wherever its padding lies: a sliding window
    reaches over the gap that right padding leaves in the cache. Masks by cache index (as transformers builds them) hide
    too much there. Every query sees its own slot, so that the scores of a padded query stay finite.
    ``key_mask``: bool [B, K], ``past``: slots before the first query, ``window``: of kind sliding and chunked.
    """
    positions = key_mask.to(torch.int64).cumsum(1) - 1
    key = positions[:, None, None, :]
    slots = torch.arange(keys, device=key_mask.device)
    query_slots = torch.arange(queries, device=key_mask.device) + past
    query = positions.index_select(1, query_slots)[:, None, :, None]
    seen = key_mask[:, None, None, :].expand(-1, 1, queries, -1)
    if kind != "bidirectional":
        seen = seen & (key <= query)
    if kind == "sliding":
        seen = seen & (query - key < window)
    if kind == "chunked":
        seen = seen & (query // window == key // window)
    own = slots[None, None, None, :] == query_slots[None, None, :, None]
    return seen | own


@torch.library.custom_op("calque::cache_update", mutates_args=())
def cache_update(past: Tensor, new: Tensor, state: str) -> Tensor:
    """Return the whole key or value, [B, H, P + S, D], after ``new`` [B, H, S, D] is added to ``past`` [B, H, P, D]."""
    return torch.cat([past, new], dim=2)


@cache_update.register_fake
def _(past: Tensor, new: Tensor, state: str) -> Tensor:
    return torch.cat([past, new], dim=2)


@torch.library.custom_op("calque::attention_mask", mutates_args=())
def attention_mask(full: Tensor, key_mask: Tensor | None, kind: str, window: int) -> Tensor:
    """Return ``full``, bool [B, 1, Q, K], while saying what it means: a lowering that understands drops ``full``."""
    return full.clone()


@attention_mask.register_fake
def _(full: Tensor, key_mask: Tensor | None, kind: str, window: int) -> Tensor:
    return torch.empty_like(full)


def decompose_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, causal: bool
) -> Tensor:
    """Return attention written in ATen, float32 softmax, keys and values repeated to the heads of the queries."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and causal:
        ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = ones.tril(k.shape[2] - q.shape[2])[None, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is None:
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)
    extra = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    weights = torch.softmax(torch.cat([scores, extra], -1), -1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(q.dtype), v)


@torch.library.custom_op("calque::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, causal: bool
) -> Tensor:
    """Return softmax(softcap(q·kᵀ·scale) + mask)·v, [B, H, Q, Dv].

    q [B, H, Q, D], k [B, Hkv, K, D], v [B, Hkv, K, Dv]; ``mask`` bool [B, 1, Q, K] already holds causality; ``softcap``
    0 means none; ``sinks`` [H] are scores that take weight and give nothing; ``mask=None, causal=True`` means
    lower-right causal.
    """
    return decompose_attention(q, k, v, mask, scale, softcap, sinks, causal)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, causal: bool) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@torch.library.custom_op("calque::keep_last", mutates_args=())
def keep_last(hidden: Tensor, count: Tensor) -> Tensor:
    """Return the last ``count`` positions of ``hidden`` [B, S, H]; all of them where ``count`` is 0."""
    return hidden[:, -int(count) :].clone()


@keep_last.register_fake
def _(hidden: Tensor, count: Tensor) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return hidden.new_empty(hidden.shape[0], kept, hidden.shape[2])
