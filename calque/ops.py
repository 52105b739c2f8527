"""The semantic operators: what a graph means, kept whole until a target decides how to say it.

Each has a fake (shapes), a reference implementation (any stage runs in ``torch.fx.Interpreter``) and a decomposition
to ATen, which here is one and the same function: the reference is written in plain tensor operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calque.packing import unpack, unpacked_weight
from calque.quantization import dequantize


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


@torch.library.custom_op("calque::write_slots", mutates_args=())
def write_slots(past: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    """Return ``past`` [B, H, M, D] with ``new`` [B, H, S, D] in the slots of each row from ``write_indices`` [B] on."""
    slots = write_indices[:, None] + torch.arange(new.shape[2])
    return past.scatter(2, slots[:, None, :, None].expand_as(new), new)


@write_slots.register_fake
def _(past: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(past)


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


@torch.library.custom_op("calque::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Return x / √(mean(x²) + epsilon) · weight over the last axis, computed in float32; ``weight`` [D], None meaning ones."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("calque::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + residual``, and that sum."""
    total = x + residual
    return rms_norm(total, weight, epsilon), total


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("calque::add_layer_norm", mutates_args=())
def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the layer norm of ``x + residual`` over the last axis, and that sum."""
    total = x + residual
    return torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, epsilon), total


@add_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("calque::quick_gelu", mutates_args=())
def quick_gelu(x: Tensor, alpha: float) -> Tensor:
    """Return x · sigmoid(alpha · x)."""
    return x * torch.sigmoid(alpha * x)


@quick_gelu.register_fake
def _(x: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("calque::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int) -> Tensor:
    """Return heads [B, H, S, D] turned by their angles: pairs (a, b) become (a·cos - b·sin, b·cos + a·sin).

    ``cos``, ``sin`` [B, S, size/2]: the first ``size`` of D are turned, the rest pass. Pairs are (i, i + size/2), or
    (2i, 2i + 1) if ``interleaved``.
    """
    half = size // 2
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([joined, rest], dim=-1)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("calque::flat_rotary", mutates_args=())
def flat_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int, heads: int) -> Tensor:
    """Return what ``rotary`` does with heads that lie beside each other, [B, S, heads·D]."""
    apart = x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)
    turned: Tensor = rotary(apart, cos, sin, interleaved, size)
    return turned.transpose(1, 2).flatten(2)


@flat_rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int, heads: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("calque::flat_rms_norm", mutates_args=())
def flat_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, heads: int) -> Tensor:
    """Return what ``rms_norm`` does with each of the heads that lie beside each other, [B, S, heads·D].

    ``weight`` [D] is that of every head, [heads·D] one for each.
    """
    apart: Tensor = rms_norm(x.reshape(x.shape[0], x.shape[1], heads, -1), None, epsilon)
    if weight is not None:
        apart = apart * weight.float().reshape(-1, apart.shape[-1])
    return apart.to(x.dtype).flatten(2)


@flat_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, epsilon: float, heads: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("calque::split_heads", mutates_args=())
def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return heads that lie beside each other, [B, S, heads·D], as an axis of their own, [B, S, heads, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).clone()


@split_heads.register_fake
def _(x: Tensor, heads: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], heads, x.shape[2] // heads)


@torch.library.custom_op("calque::join_heads", mutates_args=())
def join_heads(x: Tensor) -> Tensor:
    """Return heads [B, S, H, D] beside each other, [B, S, H·D]."""
    return x.flatten(2).clone()


@join_heads.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] * x.shape[3])


@torch.library.custom_op("calque::dequantize_weight", mutates_args=())
def dequantize_weight(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, group: int) -> Tensor:
    """Return (q - zero_point) · scale, of the type of ``scale`` [out, in]: what integers of so many bits stand for.

    q int8 [out, in], signed and unpacked, or float8_e4m3fn; scale and zero_point int8 [out, in / group]: groups lie along ``axis``,
    which is 1; ``group`` 0 is a whole row.
    """
    return dequantize(q, scale, zero_point, group).to(scale.dtype)


@dequantize_weight.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, group: int) -> Tensor:
    return scale.new_empty(q.shape)


@torch.library.custom_op("calque::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int, group: int, size: int
) -> Tensor:
    """Return x · weightᵀ + bias, x [..., size], of a weight whose integers are packed as ``pack`` does, [out, groups, bytes].

    scale float32 [out, groups]; zero_point uint8 [out, bytes], packed as well.
    """
    weight = unpacked_weight(packed, scale, zero_point, bits, group)
    return torch.nn.functional.linear(x, weight, bias)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int, group: int, size: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("calque::packed_embedding", mutates_args=())
def packed_embedding(ids: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, size: int) -> Tensor:
    """Return the rows, [..., size], that ids ask for of a table whose integers are packed as those of ``packed_linear``.

    zero_point uint8 [out, groups]: one in a byte, whatever their bits.
    """
    rows, scales = packed[ids].flatten(0, -3), scale[ids].flatten(0, -2)
    zeros = None if zero_point is None else (zero_point[ids].flatten(0, -2).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    q = unpack(rows, bits, size)
    return dequantize(q, scales, zeros, group).reshape(*ids.shape, size)


@packed_embedding.register_fake
def _(ids: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, size: int) -> Tensor:
    return scale.new_empty(*ids.shape, size)


@torch.library.custom_op("calque::mask_bias", mutates_args=())
def mask_bias(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what is added to scores to hide what a boolean mask does not show: 0 or the lowest number of ``dtype``.

    The lowest float32 would be minus infinity in float16, and a row that sees nothing NaN.
    """
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@mask_bias.register_fake
def _(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return mask.new_empty(mask.shape, dtype=dtype)


@torch.library.custom_op("calque::padding_bias", mutates_args=())
def padding_bias(key_mask: Tensor, queries: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``mask_bias`` of a mask that hides padding alone, from each of the queries: [B, 1, S, K].

    ``key_mask`` bool [B, K], false where padding is; ``queries`` [B, S, …] says how many there are.
    """
    bias: Tensor = mask_bias(key_mask[:, None, None, :].expand(-1, 1, queries.shape[1], -1), dtype)
    return bias


@padding_bias.register_fake
def _(key_mask: Tensor, queries: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return key_mask.new_empty(key_mask.shape[0], 1, queries.shape[1], key_mask.shape[1], dtype=dtype)


def _seen(slots: Tensor, keys: int, window: int) -> Tensor:
    """Return which slots a query at each of ``slots`` [B, S] sees, bool [B, 1, S, keys]: none later, at most ``window`` back."""
    query, key = slots[:, None, :, None], torch.arange(keys)
    return (key <= query) & (key > query - window) if window else key <= query


@torch.library.custom_op("calque::grouped_attention", mutates_args=())
def grouped_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    sinks: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
    window: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention [B, S, heads·D] with the cache it keeps: key and value [B, kv_heads, P + S, D], new ones added.

    q [B, S, heads·D], k and v [B, S, kv_heads·D] as projections leave them, or all three beside each other in q; past
    [B, kv_heads, P, D]. One of two:
    - ``bias`` float [B, 1, S, P + S], as ``mask_bias`` makes it, hides keys, as do later slots than a query's own; slots of the cache
      are those of the call, padding included.
    - ``key_mask`` int64 [B, P + S], padding on the right alone: each row's tokens fill its slots from 0 without gaps, the
      rest of the cache is unspecified. Causal, ``window`` keys back where that is not 0. ``cos``, ``sin`` [longest, R/2]:
      queries and keys are turned by their slots.
    """
    batch, new = q.shape[:2]
    if k is None or v is None:
        size = past_key.shape[3]
        q, k, v = torch.split(q, [heads * size, kv_heads * size, kv_heads * size], dim=2)
    query, key, value = (x.reshape(batch, new, n, -1).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    past = past_key.shape[2]
    slots = torch.arange(past, past + new).expand(batch, -1)
    if key_mask is not None:
        held = key_mask.sum(1, keepdim=True)
        slots = (held - new if past else torch.zeros_like(held)) + torch.arange(new)
        if cos is not None and sin is not None:
            query, key = (rotary(x, cos[slots], sin[slots], interleaved, 2 * cos.shape[1]) for x in (query, key))
    whole_key, whole_value = (
        torch.cat([old, torch.zeros_like(x)], 2).scatter(2, slots[:, None, :, None].expand_as(x), x)
        for old, x in ((past_key, key), (past_value, value))
    )
    mask = _seen(slots, past + new, window)
    if bias is not None:
        mask = mask & (bias > torch.finfo(bias.dtype).min / 2)
    out = decompose_attention(query, whole_key, whole_value, mask, scale, softcap, sinks, True)
    return out.transpose(1, 2).reshape(batch, new, -1), whole_key, whole_value


@grouped_attention.register_fake
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, past_key: Tensor, past_value: Tensor, bias: Tensor | None, key_mask: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, sinks: Tensor | None, heads: int, kv_heads: int, scale: float, softcap: float,
    window: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = (past_key.shape[0], past_key.shape[1], past_key.shape[2] + q.shape[1], past_key.shape[3])
    out = q.new_empty(q.shape[0], q.shape[1], heads * past_key.shape[3])
    return out, q.new_empty(kept), q.new_empty(kept)
