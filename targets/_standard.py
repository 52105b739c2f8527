"""Semantic operators in the standard's own, which any runtime of their opset runs.

Source: the operators of ONNX, https://onnx.ai/onnx/operators, opsets 23 and 24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset23 as op

from calque import expert_ops, ops, quantized_ops, slot_ops  # noqa: F401  # register torch.ops.calque, which the table names

# What came after the last opset that torch.onnx writes: the operator, and the opset that has it.
SLOTS, SLOTS_OPSET = "TensorScatter", 24
LOWEST = float(torch.finfo(torch.float32).min)
FLOAT = ir.DataType.FLOAT

Table = Mapping[Any, Callable[..., Any]]


def ints(*values: int) -> Any:
    """Return a constant int64 tensor."""
    return op.Constant(value_ints=list(values))


def placed(name: str, inputs: Sequence[Any], outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
    """Return what an operator gives that no opset of onnxscript knows; a list where it has several outputs.

    It is recorded as torch.onnx's own symbolic operators are. Source: torch/onnx/_internal/exporter/_torchlib/ops/symbolic.py@2.13.
    """
    from torch.onnx._internal.exporter import _core, _tensors

    recorder = _core.current_tracer
    assert recorder is not None, "only a translation that runs may place operators"
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    made = [_tensors.SymbolicTensor(recorder.opset) for _ in range(outputs)]
    recorder.nodes.append(ir.Node(domain, name, given, ir.convenience.convert_attributes(attributes), outputs=made, version=1))
    return made[0] if outputs == 1 else made


def write_slots(past: Any, new: Any, write_indices: Any) -> Any:
    """Return ``TensorScatter``, which ONNX Runtime does in place where input and output are bound to the same memory."""
    return placed(SLOTS, [past, new, write_indices], axis=-2)


def split_with_sizes(x: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    """Return the pieces as outputs of their own; torch.onnx would make a sequence of them."""
    return tuple(placed("Split", [x, ints(*sizes)], len(sizes), axis=dim)) if len(sizes) > 1 else (op.Identity(x),)


def split(x: Any, size: int, dim: int = 0) -> Any:
    """Return the pieces of one size, the last of which may be smaller."""
    whole = x.shape[dim]
    return split_with_sizes(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


def attention(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, sinks: Any, causal: bool) -> Any:
    """Return standard ``Attention``, which repeats keys and values itself; sinks, which it lacks, are written out."""
    if mask is None and causal:
        mask = lower_right(q, k)
    if sinks is not None:
        return written_attention(q, k, v, mask, scale, softcap, sinks)
    precision: dict[str, int] = {} if q.dtype == FLOAT else {"softmax_precision": FLOAT}
    return op.Attention(q, k, v, mask, scale=scale, softcap=softcap, **precision)[0]


def written_attention(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, sinks: Any) -> Any:
    """Return attention in products and a softmax of float32; the heads of the queries are grouped by the keys that they share."""
    heads, groups, size, value_size = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    grouped = op.Reshape(q, ints(0, groups, heads // groups, -1, size))
    key = op.Transpose(op.Unsqueeze(k, ints(2)), perm=[0, 1, 2, 4, 3])
    scores = op.Mul(wide(op.MatMul(grouped, key), q.dtype), op.Constant(value_float=scale))
    if softcap > 0:
        cap = op.Constant(value_float=softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if mask is not None:
        scores = op.Where(op.Unsqueeze(mask, ints(1)), scores, op.Constant(value_float=LOWEST))
    weights = op.Softmax(scores, axis=-1) if sinks is None else _beside_sinks(scores, op.Reshape(wide(sinks), ints(1, groups, -1, 1, 1)))
    out = op.MatMul(op.CastLike(weights, v), op.Unsqueeze(v, ints(2)))
    return op.Reshape(out, ints(0, heads, -1, value_size))


def _beside_sinks(scores: Any, sinks: Any) -> Any:
    """Return the softmax of scores beside a sink, which is one more score per head and query and takes its part of the weight."""
    # Adding it to zeros of the row's shape broadcasts it there.
    zeros = op.Mul(op.ReduceMax(scores, ints(-1), keepdims=1), op.Constant(value_float=0.0))
    weights = op.Softmax(op.Concat(scores, op.Add(zeros, sinks), axis=-1), axis=-1)
    return op.Slice(weights, ints(0), ints(-1), ints(-1))


def wide(x: Any, dtype: Any = None) -> Any:
    """Return the value in float32; ``dtype``: its type, where it does not say that itself."""
    return x if (dtype or x.dtype) == FLOAT else op.Cast(x, to=FLOAT)


def lower_right(q: Any, k: Any) -> Any:
    """Return the causal mask of queries that are the last of the keys, bool [1, 1, Q, K]; ``is_causal`` would mean the first."""
    queries: Any = op.Squeeze(op.Shape(q, start=2, end=3))
    keys: Any = op.Squeeze(op.Shape(k, start=2, end=3))
    zero: Any = op.Constant(value_int=0)
    one: Any = op.Constant(value_int=1)
    key: Any = op.Range(zero, keys, one)
    last_seen: Any = op.Add(op.Range(zero, queries, one), op.Sub(keys, queries))
    return op.LessOrEqual(op.Unsqueeze(key, ints(0, 1, 2)), op.Unsqueeze(last_seen, ints(0, 1, 3)))


def keep_last(hidden: Any, count: Any) -> Any:
    """Return the last positions; a count of 0 starts the slice at 0 and so keeps all."""
    axis = ints(1)
    start = op.Reshape(op.Neg(count), ints(1))
    return op.Slice(hidden, start, ints(2**63 - 1), axis)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return the product with a weight that stays [out, in] because something else reads it too (a tied head)."""
    out = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return out if bias is None else op.Add(out, bias)


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """Return standard ``RMSNormalization``; without a weight, what it is made of."""
    if weight is None:
        full = wide(x)
        mean = op.ReduceMean(op.Mul(full, full), ints(-1), keepdims=1)
        return op.CastLike(op.Div(full, op.Sqrt(op.Add(mean, op.Constant(value_float=epsilon)))), x)
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


def add_rms_norm(x: Any, residual: Any, weight: Any, epsilon: float) -> Any:
    """Return the norm of the sum, and the sum."""
    total = op.Add(x, residual)
    return rms_norm(total, weight, epsilon), total


def add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """Return the layer norm of the sum, and the sum."""
    total = op.Add(x, residual)
    return op.LayerNormalization(total, weight, bias, axis=-1, epsilon=epsilon)[0], total


def quick_gelu(x: Any, alpha: float) -> Any:
    """Return x · sigmoid(alpha · x), of which ONNX Runtime makes its QuickGelu when it loads."""
    number: Any = op.Constant(value_float=alpha)
    return op.Mul(x, op.Sigmoid(op.Mul(x, number if x.dtype == FLOAT else op.CastLike(number, x))))


def rotary(x: Any, cos: Any, sin: Any, interleaved: bool, size: int) -> Any:
    """Return standard ``RotaryEmbedding`` of [B, H, S, D]; where a part is turned, it wants both counts."""
    heads, part = (x.shape[1], size) if size != x.shape[3] else (0, 0)
    return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved), num_heads=heads, rotary_embedding_dim=part)


def flat_rotary(x: Any, cos: Any, sin: Any, interleaved: bool, size: int, heads: int) -> Any:
    """Return standard ``RotaryEmbedding`` of heads beside each other, [B, S, heads·D]."""
    part = size if size * heads != x.shape[2] else 0
    return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved), num_heads=heads, rotary_embedding_dim=part)


def mask_bias(mask: Any, dtype: int = FLOAT) -> Any:
    """Return 0 where the mask shows a key, and the lowest number of the type where not."""
    numpy = ir.DataType(dtype).numpy()
    lowest: Any = ml_dtypes.finfo(numpy).min  # type: ignore[no-untyped-call]
    constants: list[Any] = [ir.tensor(np.array(number, numpy)) for number in (0, lowest)]
    shown, hidden = (cast("Any", op.Constant(value=number)) for number in constants)
    return op.Where(mask, shown, hidden)


def padding_bias(key_mask: Any, queries: Any, dtype: int = FLOAT) -> Any:
    """Return 0 where a key is no padding, and the lowest number of the type where it is, for each query."""
    row: Any = mask_bias(op.Unsqueeze(key_mask, ints(1, 2)), dtype)
    return op.Expand(row, op.Concat(ints(1, 1), op.Shape(queries, start=1, end=2), ints(1), axis=0))


def split_heads(x: Any, heads: int) -> Any:
    """Return heads as an axis of their own; batch and sequence are taken as they are, without arithmetic on shapes."""
    return op.Reshape(x, ints(0, 0, heads, -1))


def join_heads(x: Any) -> Any:
    """Return heads beside each other; batch and sequence are taken as they are."""
    return op.Reshape(x, ints(0, 0, -1))


def dequantize_weight(q: Any, scale: Any, zero_point: Any, bits: int, axis: int, group: int) -> Any:
    """Return ``DequantizeLinear``, a whole row being one block where ``group`` is 0."""
    return dequantize_linear(q, scale, zero_point, bits, axis, group or q.shape[axis])


def dequantize_linear(q: Any, scale: Any, zero_point: Any, bits: int, axis: int, group: int) -> Any:
    """Return ``DequantizeLinear``; integers of 4 bits are given their type where weights are bound."""
    return op.DequantizeLinear(q, scale, zero_point, axis=axis, **({"block_size": group} if group else {}))


def dequantize_lookup(ids: Any, q: Any, scale: Any, zero_point: Any, axis: int, group: int) -> Any:
    """Return the entries as numbers: integers are looked up, not the whole table made numbers before."""
    rank, size = len(ids.shape), q.shape[1 - axis]

    def entries(part: Any, vector: bool) -> Any:
        """Return [*ids, 1, size], or with scales of groups [*ids, groups, 1]."""
        at = 0 if vector else axis
        found = op.Gather(part, ids, axis=at)
        return op.Transpose(found, perm=[*range(1, rank + 1), 0]) if at else found

    number: Any = op.Cast(entries(q, False), to=FLOAT)
    if group:
        number = op.Reshape(number, ints(*[0] * rank, size // group, group))
    if zero_point is not None:
        zero: Any = op.Cast(op.Unsqueeze(entries(zero_point, not group), ints(-1)), to=FLOAT)
        number = op.Sub(number, zero)
    number = op.Mul(number, wide(op.Unsqueeze(entries(scale, not group), ints(-1)), scale.dtype))
    number = op.Reshape(number, ints(*[0] * rank, size)) if group else number
    return number if scale.dtype == FLOAT else op.Cast(number, to=scale.dtype)


def round_activations(x: Any) -> Any:
    """Return ``DynamicQuantizeLinear``, and back."""
    return op.DequantizeLinear(*op.DynamicQuantizeLinear(x))


def dynamic_linear(x: Any, q: Any, scale: Any, bias: Any) -> Any:
    """Return ``MatMulInteger`` of what is rounded anew in each call, of which ONNX Runtime makes its DynamicQuantizeMatMul."""
    integers, steps, zero_point = op.DynamicQuantizeLinear(x)
    summed = op.Cast(op.MatMulInteger(integers, q, zero_point), to=FLOAT)
    out = op.Mul(summed, op.Mul(steps, scale))
    return out if bias is None else op.Add(out, bias)


STANDARD: Table = {
    torch.ops.calque.dequantize_linear.default: dequantize_linear,
    torch.ops.calque.dequantize_lookup.default: dequantize_lookup,
    torch.ops.calque.quantize_linear.default: lambda x, scale, zero_point: op.QuantizeLinear(x, scale, zero_point),
    torch.ops.calque.round_activations.default: round_activations,
    torch.ops.calque.dynamic_linear.default: dynamic_linear,
    torch.ops.calque.flat_rotary.default: flat_rotary,
    torch.ops.calque.mask_bias.default: mask_bias,
    torch.ops.calque.padding_bias.default: padding_bias,
    torch.ops.calque.split_heads.default: split_heads,
    torch.ops.calque.join_heads.default: join_heads,
    torch.ops.calque.rms_norm.default: rms_norm,
    torch.ops.calque.add_rms_norm.default: add_rms_norm,
    torch.ops.calque.add_layer_norm.default: add_layer_norm,
    torch.ops.calque.quick_gelu.default: quick_gelu,
    torch.ops.calque.rotary.default: rotary,
    torch.ops.calque.attention_mask.default: lambda full, key_mask, kind, window: op.Identity(full),
    torch.ops.calque.attention.default: attention,
    torch.ops.calque.keep_last.default: keep_last,
    torch.ops.calque.dequantize_weight.default: dequantize_weight,
    torch.ops.calque.write_slots.default: write_slots,
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.split_with_sizes.default: split_with_sizes,
    torch.ops.aten.split.Tensor: split,
}
