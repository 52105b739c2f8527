"""The semantic operators in those of MIL: attention whole where MIL can say it, norms in float32, integers as constexpr.

Source: the operators of coremltools@9.0, opset iOS18.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch.fx import Node

from calque import expert_ops, ops, quantized_ops, slot_ops  # noqa: F401  # register torch.ops.calque, which the table names
from calque.runtime.coreml_session import io_name
from calque.targets._coreml_function import Building, Rule
from calque.targets._coreml_operators import FLOAT, dtype_of
from calque.targets._coreml_shapes import reshaped

calque = torch.ops.calque
LOWEST = np.float32(np.finfo(np.float32).min)
HIDDEN = -3e4
# What one value of 4 bits may be, in the order of its indices.
LEVELS = np.arange(-8, 8, dtype=np.int8)
# Integers of so many bits as MIL stores them.
CODES: Mapping[int, Callable[[Any], Any]] = {4: lambda q: q.astype(types.np_int4_dtype), 8: lambda q: q}


def attention(f: Building, node: Node, q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, sinks: Any, causal: bool) -> Any:
    """Return MIL's attention, which divides by the root of the size and repeats no heads; caps and sinks are written out."""
    dtype = dtype_of(node)
    query, key, value = (f.as_type(f.value(part), dtype) for part in (q, k, v))
    groups = f.dims(q)[1] // f.dims(k)[1]
    key, value = (_repeated(f, part, given, groups) for part, given in ((key, k), (value, v)))
    seen = f.value(mask) if mask is not None else _lower_right(f, q, k) if causal else None
    size = f.dims(q)[3]
    if softcap > 0 or sinks is not None:
        return _written(f, node, query, key, value, seen, scale, softcap, sinks)
    times = scale * math.sqrt(size)
    if not math.isclose(times, 1, rel_tol=1e-6):
        query = mb.mul(x=query, y=f.as_type(times, dtype))
    shown = {} if seen is None else {"attn_mask": seen if mask is None or _shows_its_own(mask) else _bias(f, seen, dtype)}
    return mb.scaled_dot_product_attention(query=query, key=key, value=value, **shown)


def _shows_its_own(mask: Any) -> bool:
    """Return whether each query sees a key at least, as masks do that say what they mean."""
    return bool(mask.target is calque.attention_mask.default and mask.args[2] != "custom")


def _bias(f: Building, mask: Any, dtype: torch.dtype) -> Any:
    """Return what hides keys by being added to scores. Of a query that sees none, scores that are all -inf would be NaN.

    It is far from the end of float16, so that no sum is infinite, and below it no share is left.
    """
    hidden = mb.logical_not(x=mask)
    return mb.mul(x=f.as_type(hidden, dtype), y=f.as_type(HIDDEN, dtype))


def _repeated(f: Building, heads: Any, node: Node, times: int) -> Any:
    """Return each head so many times in a row."""
    if times == 1:
        return heads
    batch, count, length, size = f.dims(node)
    apart = mb.tile(x=mb.expand_dims(x=heads, axes=[2]), reps=[1, 1, times, 1, 1])
    return mb.reshape(x=apart, shape=f.shape([batch, count * times, length, size]))


def _lower_right(f: Building, q: Node, k: Node) -> Any:
    """Return the causal mask of queries that are the last of the keys, bool [1, 1, Q, K]."""
    queries, keys = (f.as_type(f.scalar(f.dims(part)[2]), torch.int32) for part in (q, k))
    key = mb.range_1d(start=np.int32(0), end=keys, step=np.int32(1))
    query = mb.range_1d(start=mb.sub(x=keys, y=queries), end=keys, step=np.int32(1))
    return mb.less_equal(x=mb.expand_dims(x=key, axes=[0, 1, 2]), y=mb.expand_dims(x=query, axes=[0, 1, 3]))


def _written(f: Building, node: Node, q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, sinks: Any) -> Any:
    """Return attention in products and a softmax of float32."""
    dtype = dtype_of(node)
    # Before the product, whose sums would leave float16.
    scores = f.as_type(mb.matmul(x=mb.mul(x=q, y=f.as_type(scale, dtype)), y=k, transpose_y=True), FLOAT)
    if softcap > 0:
        scores = mb.mul(x=mb.tanh(x=mb.mul(x=scores, y=np.float32(1 / softcap))), y=np.float32(softcap))
    if mask is not None:
        scores = mb.select(cond=mask, a=scores, b=LOWEST)
    if sinks is None:
        weights = mb.softmax(x=scores, axis=-1)
    else:
        heads = mb.reshape(x=f.as_type(f.value(sinks), FLOAT), shape=[1, -1, 1, 1])
        # Adding it to zeros of the rows' shape broadcasts it there.
        zeros = mb.mul(x=mb.reduce_max(x=scores, axes=[-1], keep_dims=True), y=np.float32(0))
        beside = mb.softmax(x=mb.concat(values=[scores, mb.add(x=zeros, y=heads)], axis=3), axis=-1)
        weights = mb.slice_by_index(x=beside, begin=[0] * 4, end=[0, 0, 0, -1], begin_mask=[True] * 4, end_mask=[True, True, True, False])
    return mb.matmul(x=f.as_type(weights, dtype), y=v)


def rms_norm(f: Building, node: Node, x: Any, weight: Any, epsilon: float) -> Any:
    """Return the norm, in float32 inside."""
    return _rms_norm(f, f.value(x), None if weight is None else f.value(weight), epsilon, dtype_of(node))


def _rms_norm(f: Building, value: Any, weight: Any, epsilon: float, dtype: torch.dtype) -> Any:
    wide = f.as_type(value, FLOAT)
    mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
    normed = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=np.float32(epsilon)))
    return f.as_type(normed if weight is None else mb.mul(x=normed, y=f.as_type(weight, FLOAT)), dtype)


def add_rms_norm(f: Building, node: Node, x: Any, residual: Any, weight: Any, epsilon: float) -> list[Any]:
    """Return the norm of the sum, and the sum."""
    total = mb.add(x=f.value(x), y=f.value(residual))
    return [_rms_norm(f, total, f.value(weight), epsilon, node.meta["val"][0].dtype), total]


def rotary(f: Building, node: Node, x: Any, cos: Any, sin: Any, interleaved: bool, size: int) -> Any:
    """Return heads turned by their angles; pairs are halves, or neighbours."""
    dtype, (batch, heads, length, whole), half = dtype_of(node), f.dims(node), size // 2
    value = f.value(x)
    turn, turn_by = (mb.expand_dims(x=f.as_type(f.value(part), dtype), axes=[1]) for part in (cos, sin))
    sizes = [2 * half, whole - 2 * half] if interleaved else [half, half, whole - 2 * half]
    parts = list(mb.split(x=value, split_sizes=[part for part in sizes if part], axis=3)) if len([p for p in sizes if p]) > 1 else [value]
    if interleaved:
        first, second = (_every_second(parts[0], at) for at in (0, 1))
        rest = parts[1:]
    else:
        first, second, *rest = parts
    left = mb.sub(x=mb.mul(x=first, y=turn), y=mb.mul(x=second, y=turn_by))
    right = mb.add(x=mb.mul(x=second, y=turn), y=mb.mul(x=first, y=turn_by))
    if not interleaved:
        return mb.concat(values=[left, right, *rest], axis=3)
    turned = mb.reshape(x=mb.stack(values=[left, right], axis=4), shape=f.shape([batch, heads, length, 2 * half]))
    return mb.concat(values=[turned, *rest], axis=3) if rest else turned


def _every_second(value: Any, first: int) -> Any:
    return mb.slice_by_index(
        x=value, begin=[0, 0, 0, first], end=[0] * 4, stride=[1, 1, 1, 2], begin_mask=[True, True, True, False], end_mask=[True] * 4
    )


def quick_gelu(f: Building, node: Node, x: Any, alpha: float) -> Any:
    """Return x · sigmoid(alpha · x)."""
    value = f.value(x)
    return mb.mul(x=value, y=mb.sigmoid(x=mb.mul(x=value, y=f.as_type(alpha, dtype_of(node)))))


def write_slots(f: Building, node: Node, past: Any, new: Any, write_indices: Any) -> Any:
    """Return the slots with new ones written; of a state, which is written too. A row alone: each would begin elsewhere."""
    if f.dims(past)[0] != 1:
        raise ValueError("slots of several rows in one call are not translated")
    held = f.value(past)
    first = f.value(write_indices)
    last = mb.add(x=first, y=f.shape([f.dims(new)[2]], inferred=False))
    zero = np.array([0], np.int32)
    begin, end = (mb.concat(values=[zero, zero, place, zero], axis=0) for place in (first, last))
    masks = [True, True, False, True]
    written = mb.slice_update(x=held, update=f.value(new), begin=begin, end=end, begin_mask=masks, end_mask=masks)
    return mb.coreml_update_state(state=f.states[past], value=written) if past in f.states else written


def dequantize_weight(f: Building, node: Node, q: Any, scale: Any, zero_point: Any, bits: int, axis: int, group: int) -> Any:
    """Return ``constexpr_blockwise_shift_scale`` of the integers as they are; palettized ones are places in a table of all levels."""
    name = f.parameters[q].removesuffix(".q")
    weight = f.model.weights[f.parameters[q]]
    if weight.dtype != "int8":
        raise ValueError(f"weights of {weight.dtype} are not translated")
    spread = f.value(scale)
    shift = {} if zero_point is None else {"offset": f.shared.array(f.model.weights[f.parameters[zero_point]], CODES[bits])}
    if bits == 4 and f.shared.palettized:
        places = f.weight(weight, f"{name}.indices", lambda q: (q + 8).astype(types.np_uint4_dtype))
        table = LEVELS.reshape(*[1] * len(weight.shape), 16, 1)
        data = mb.constexpr_lut_to_dense(indices=places, lut=table, name=io_name(f"{name}.levels"))
    else:
        data = f.weight(weight, f"{name}.q", CODES[bits])
    f.shared.integers[io_name(name)] = name
    return mb.constexpr_blockwise_shift_scale(data=data, scale=spread, name=io_name(name), **shift)


SEMANTIC: Mapping[Any, Rule] = {
    calque.attention.default: attention,
    calque.attention_mask.default: lambda f, node, full, *_: f.value(full),
    calque.rms_norm.default: rms_norm,
    calque.add_rms_norm.default: add_rms_norm,
    calque.rotary.default: rotary,
    calque.quick_gelu.default: quick_gelu,
    calque.split_heads.default: reshaped,
    calque.join_heads.default: reshaped,
    calque.write_slots.default: write_slots,
    calque.dequantize_weight.default: dequantize_weight,
}
