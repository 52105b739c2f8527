"""Operators of ATen in those of MIL: arithmetic, comparisons, products, reductions and what reads images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch.fx import Node

from calque.targets._coreml_function import Building, Rule, rank

aten = torch.ops.aten
FLOAT = torch.float32


def dtype_of(node: Node) -> torch.dtype:
    """Return the type of a node's value."""
    found: torch.dtype = node.meta["val"].dtype
    return found


def arithmetic(operator: Callable[..., Any]) -> Rule:
    """Return the rule of an operator of two values that computes in the type of its result."""

    def rule(f: Building, node: Node, x: Any, y: Any, alpha: Any = 1) -> Any:
        left, right = (f.as_type(f.value(value), dtype_of(node)) for value in (x, y))
        if alpha != 1:
            right = mb.mul(x=right, y=f.as_type(alpha, dtype_of(node)))
        return operator(x=left, y=right)

    return rule


def comparison(operator: Callable[..., Any]) -> Rule:
    """Return the rule of an operator that compares two values."""

    def rule(f: Building, node: Node, x: Any, y: Any) -> Any:
        left, right = f.operands(x, y)
        return operator(x=left, y=right)

    return rule


def logical(operator: Callable[..., Any]) -> Rule:
    """Return the rule of an operator of two truths."""
    return lambda f, node, x, y: operator(x=f.as_type(f.value(x), torch.bool), y=f.as_type(f.value(y), torch.bool))


def unary(operator: Callable[..., Any], **options: Any) -> Rule:
    """Return the rule of an operator of one value, in the type of its result."""
    return lambda f, node, x, **_: operator(x=f.as_type(f.value(x), dtype_of(node)), **options)


def divide(f: Building, node: Node, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    """Return the quotient; whole numbers by ``/`` are divided as real ones."""
    left, right = (f.as_type(f.value(value), dtype_of(node)) for value in (x, y))
    if rounding_mode is None:
        return mb.real_div(x=left, y=right)
    if rounding_mode != "floor":
        raise ValueError(f"rounding_mode {rounding_mode} is not translated")
    return mb.floor_div(x=left, y=right)


def power(f: Building, node: Node, x: Any, y: Any) -> Any:
    """Return x to the power of y."""
    left, right = (f.as_type(f.value(value), dtype_of(node)) for value in (x, y))
    if y == 2:
        return mb.mul(x=left, y=left)
    return mb.pow(x=left, y=right)


def clamp(f: Building, node: Node, x: Any, low: Any = None, high: Any = None) -> Any:
    """Return the value between two numbers, either of which may be none."""
    value = f.as_type(f.value(x), dtype_of(node))
    value = value if low is None else mb.maximum(x=value, y=f.as_type(f.value(low), dtype_of(node)))
    return value if high is None else mb.minimum(x=value, y=f.as_type(f.value(high), dtype_of(node)))


def where(f: Building, node: Node, condition: Any, x: Any, y: Any) -> Any:
    """Return x where the condition holds, else y. MIL takes the shape from x and y, so one of them must have that of the result."""
    a, b = (f.as_type(f.value(value), dtype_of(node)) for value in (x, y))
    sizes = f.dims(node)
    if not any(isinstance(value, Node) and f.dims(value) == sizes for value in (x, y)):
        zeros = mb.fill(shape=f.shape(sizes, inferred=False), value=f.as_type(0, dtype_of(node)))
        a = mb.add(x=zeros, y=a) if dtype_of(node) != torch.bool else mb.logical_or(x=zeros, y=a)
    return mb.select(cond=f.as_type(f.value(condition), torch.bool), a=a, b=b)


def masked_fill(f: Building, node: Node, x: Any, mask: Any, number: Any) -> Any:
    """Return a number where the mask is true, else x."""
    return where(f, node, mask, number, x)


def to_copy(f: Building, node: Node, x: Any, **_: Any) -> Any:
    """Return the value in another type."""
    return f.as_type(f.value(x), dtype_of(node))


def softmax(f: Building, node: Node, x: Any, dim: int, dtype: Any = None) -> Any:
    """Return the shares along an axis."""
    return mb.softmax(x=f.as_type(f.value(x), dtype_of(node)), axis=dim)


def reduction(operator: Callable[..., Any]) -> Rule:
    """Return the rule of an operator that reduces axes, all of them where none are named."""

    def rule(f: Building, node: Node, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        axes = list(range(rank(x))) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
        return operator(x=f.as_type(f.value(x), dtype_of(node)), axes=axes, keep_dims=keepdim)

    return rule


def cumsum(f: Building, node: Node, x: Any, dim: int, dtype: Any = None) -> Any:
    """Return the sum of all elements up to each."""
    return mb.cumsum(x=f.as_type(f.value(x), dtype_of(node)), axis=dim % rank(x))


def topk(f: Building, node: Node, x: Any, k: int, dim: int = -1, largest: bool = True, *_: Any) -> list[Any]:
    """Return the largest values and their places."""
    return list(mb.topk(x=f.value(x), k=k, axis=dim % rank(x), ascending=not largest))


def linear(f: Building, node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
    """Return the product with a weight [out, in]."""
    value, held = f.as_type(f.value(x), dtype_of(node)), f.value(weight)
    constant = held.op is not None and (held.op.op_type == "const" or held.op.op_type.startswith("constexpr"))
    if constant and rank(x) <= 3:
        added = f.zeros(f.dims(weight)[0], dtype_of(node)) if bias is None else f.value(bias)
        return mb.linear(x=value, weight=held, bias=added)
    out = mb.matmul(x=value, y=held, transpose_y=True)
    return out if bias is None else mb.add(x=out, y=f.value(bias))


def matmul(f: Building, node: Node, x: Any, y: Any) -> Any:
    """Return the product of matrices; one whose axes were exchanged just for it is read as it was."""
    left = f.as_type(f.value(x), dtype_of(node))
    before = _exchanged(y)
    if before is not None and rank(before) == 2 and rank(x) <= 3 and rank(x) > 1:
        return linear(f, node, x, before)
    if before is not None:
        return mb.matmul(x=left, y=f.as_type(f.value(before), dtype_of(node)), transpose_y=True)
    return mb.matmul(x=left, y=f.as_type(f.value(y), dtype_of(node)))


def _exchanged(node: Any) -> Node | None:
    """Return the value whose last two axes a node exchanges."""
    if not isinstance(node, Node) or node.target not in (aten.transpose.int, aten.t.default, aten.permute.default):
        return None
    size = rank(node)
    if node.target is aten.transpose.int and {axis % size for axis in node.args[1:]} != {size - 2, size - 1}:  # type: ignore[operator]
        return None
    if node.target is aten.permute.default:
        axes = [axis % size for axis in node.args[1]]  # type: ignore[union-attr,operator]
        if axes != [*range(size - 2), size - 1, size - 2]:
            return None
    found = node.args[0]
    return found if isinstance(found, Node) else None


def addmm(f: Building, node: Node, bias: Any, x: Any, y: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    """Return beta · bias + alpha · x · y, for matrices and for stacks of them."""
    out, added = matmul(f, node, x, y), f.as_type(f.value(bias), dtype_of(node))
    out = out if alpha == 1 else mb.mul(x=out, y=f.as_type(alpha, dtype_of(node)))
    return mb.add(x=out, y=added if beta == 1 else mb.mul(x=added, y=f.as_type(beta, dtype_of(node))))


def embedding(f: Building, node: Node, weight: Any, ids: Any, *_: Any) -> Any:
    """Return the rows that ids ask for."""
    return mb.gather(x=f.value(weight), indices=f.value(ids), axis=0)


def layer_norm(
    f: Building, node: Node, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
) -> Any:
    """Return the values normed over the last axes."""
    value, dtype = f.value(x), dtype_of(node)
    gamma, beta = (None if part is None else f.as_type(f.value(part), dtype) for part in (weight, bias))
    axes = list(range(-len(shape), 0))
    small = f.as_type(epsilon, dtype)
    if not small:  # 0 in float16, whose smallest number is larger
        wide = mb.layer_norm(x=f.as_type(value, FLOAT), axes=axes, epsilon=np.float32(epsilon))
        value = f.as_type(wide, dtype)
        value = value if gamma is None else mb.mul(x=value, y=gamma)
        return value if beta is None else mb.add(x=value, y=beta)
    return mb.layer_norm(x=value, axes=axes, gamma=gamma, beta=beta, epsilon=small)


def gelu(f: Building, node: Node, x: Any, approximate: str = "none") -> Any:
    """Return gelu, exact or by tanh."""
    return mb.gelu(x=f.value(x), mode="TANH_APPROXIMATION" if approximate == "tanh" else "EXACT")


def convolution(f: Building, node: Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                groups: int = 1) -> Any:  # fmt: skip
    """Return a convolution over two axes."""
    pad = [0, 0] if padding == "valid" else padding
    if isinstance(pad, str):
        raise ValueError(f"padding {pad} is not translated")
    more = {} if bias is None else {"bias": f.value(bias)}
    top, left = _pair(pad)
    return mb.conv(x=f.value(x), weight=f.value(weight), strides=_pair(stride), pad_type="custom", pad=[top, top, left, left],
                   dilations=_pair(dilation), groups=groups, **more)  # fmt: skip


def max_pool(
    f: Building, node: Node, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Any:
    """Return the largest values of windows."""
    if _pair(dilation) != [1, 1] or ceil:
        raise ValueError("a dilated pool, or one that rounds up, is not translated")
    (top, left), steps = _pair(padding), _pair(stride or kernel)
    return mb.max_pool(x=f.value(x), kernel_sizes=_pair(kernel), strides=steps, pad_type="custom", pad=[top, top, left, left])


def adaptive_pool(f: Building, node: Node, x: Any, size: Any) -> Any:
    """Return the mean over the whole image."""
    if _pair(size) != [1, 1]:
        raise ValueError("pooling to more than one value is not translated")
    return mb.reduce_mean(x=f.value(x), axes=[-2, -1], keep_dims=True)


def batch_norm(f: Building, node: Node, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float,
               epsilon: float, *_: Any) -> Any:  # fmt: skip
    """Return each channel moved and scaled."""
    dtype = dtype_of(node)
    parts = {"gamma": weight, "beta": bias, "mean": mean, "variance": variance}
    named = {name: f.as_type(f.value(part), dtype) for name, part in parts.items() if part is not None}
    settled = {name: part.val if hasattr(part, "val") else part for name, part in named.items()}
    return mb.batch_norm(x=f.value(x), epsilon=f.as_type(epsilon, dtype), **settled)


def _pair(value: Any) -> list[int]:
    parts = [value] if isinstance(value, int) else list(value)
    return [*parts, *parts] if len(parts) == 1 else parts


def negative(f: Building, node: Node, x: Any) -> Any:
    """Return the value with its sign changed."""
    return mb.mul(x=f.value(x), y=f.as_type(-1, dtype_of(node)))


def reciprocal(f: Building, node: Node, x: Any) -> Any:
    """Return 1 / x; MIL's own operator adds something to x before."""
    return mb.real_div(x=f.as_type(1, dtype_of(node)), y=f.as_type(f.value(x), dtype_of(node)))


def inverted(f: Building, node: Node, x: Any) -> Any:
    """Return the other truth."""
    if f.value(x).dtype != types.bool:
        raise ValueError("bits of whole numbers are not translated")
    return mb.logical_not(x=f.value(x))


def extreme(operator: Callable[..., Any]) -> Rule:
    """Return the rule of a reduction over named axes, which keeps the type."""
    return lambda f, node, x, dim=(), keepdim=False: operator(
        x=f.value(x), axes=[dim] if isinstance(dim, int) else list(dim) or list(range(rank(x))), keep_dims=keepdim
    )


OPERATORS: Mapping[Any, Rule] = {
    aten.add.Tensor: arithmetic(mb.add),
    aten.add.Scalar: arithmetic(mb.add),
    aten.sub.Tensor: arithmetic(mb.sub),
    aten.sub.Scalar: arithmetic(mb.sub),
    aten.rsub.Scalar: lambda f, node, x, y, alpha=1: arithmetic(mb.sub)(f, node, y, x, alpha),
    aten.mul.Tensor: arithmetic(mb.mul),
    aten.mul.Scalar: arithmetic(mb.mul),
    aten.maximum.default: arithmetic(mb.maximum),
    aten.minimum.default: arithmetic(mb.minimum),
    aten.max.other: arithmetic(mb.maximum),
    aten.min.other: arithmetic(mb.minimum),
    aten.remainder.Scalar: arithmetic(mb.mod),
    aten.remainder.Tensor: arithmetic(mb.mod),
    aten.div.Tensor: divide,
    aten.div.Scalar: divide,
    aten.div.Tensor_mode: divide,
    aten.div.Scalar_mode: divide,
    aten.floor_divide.default: lambda f, node, x, y: divide(f, node, x, y, "floor"),
    aten.pow.Tensor_Scalar: power,
    aten.pow.Tensor_Tensor: power,
    aten.pow.Scalar: power,
    aten.clamp.default: clamp,
    aten.clamp.Tensor: clamp,
    aten.clamp_min.default: clamp,
    aten.clamp_max.default: lambda f, node, x, high: clamp(f, node, x, None, high),
    **{getattr(aten.eq, kind): comparison(mb.equal) for kind in ("Tensor", "Scalar")},
    **{getattr(aten.ne, kind): comparison(mb.not_equal) for kind in ("Tensor", "Scalar")},
    **{getattr(aten.lt, kind): comparison(mb.less) for kind in ("Tensor", "Scalar")},
    **{getattr(aten.le, kind): comparison(mb.less_equal) for kind in ("Tensor", "Scalar")},
    **{getattr(aten.gt, kind): comparison(mb.greater) for kind in ("Tensor", "Scalar")},
    **{getattr(aten.ge, kind): comparison(mb.greater_equal) for kind in ("Tensor", "Scalar")},
    aten.logical_and.default: logical(mb.logical_and),
    aten.logical_or.default: logical(mb.logical_or),
    aten.bitwise_and.Tensor: logical(mb.logical_and),
    aten.bitwise_or.Tensor: logical(mb.logical_or),
    aten.logical_not.default: lambda f, node, x: mb.logical_not(x=f.as_type(f.value(x), torch.bool)),
    aten.bitwise_not.default: inverted,
    aten.where.self: where,
    aten.where.Scalar: where,
    aten.where.ScalarOther: where,
    aten.where.ScalarSelf: where,
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
    aten._to_copy.default: to_copy,
    aten.neg.default: negative,
    aten.abs.default: unary(mb.abs),
    aten.sign.default: unary(mb.sign),
    aten.exp.default: unary(mb.exp),
    aten.log.default: unary(mb.log, epsilon=np.float32(1e-45)),
    aten.sqrt.default: unary(mb.sqrt),
    aten.rsqrt.default: unary(mb.rsqrt, epsilon=np.float32(1e-45)),
    aten.reciprocal.default: reciprocal,
    aten.sin.default: unary(mb.sin),
    aten.cos.default: unary(mb.cos),
    aten.tanh.default: unary(mb.tanh),
    aten.sigmoid.default: unary(mb.sigmoid),
    aten.silu.default: unary(mb.silu),
    aten.relu.default: unary(mb.relu),
    aten.erf.default: unary(mb.erf),
    aten.floor.default: unary(mb.floor),
    aten.ceil.default: unary(mb.ceil),
    aten.round.default: unary(mb.round),
    aten.gelu.default: gelu,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.sum.dim_IntList: reduction(mb.reduce_sum),
    aten.sum.default: reduction(mb.reduce_sum),
    aten.mean.dim: reduction(mb.reduce_mean),
    aten.mean.default: reduction(mb.reduce_mean),
    aten.amax.default: extreme(mb.reduce_max),
    aten.amin.default: extreme(mb.reduce_min),
    aten.cumsum.default: cumsum,
    aten.topk.default: topk,
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.addmm.default: addmm,
    aten.baddbmm.default: addmm,
    aten.embedding.default: embedding,
    aten.layer_norm.default: layer_norm,
    aten.conv2d.default: convolution,
    aten.max_pool2d.default: max_pool,
    aten.adaptive_avg_pool2d.default: adaptive_pool,
    aten.batch_norm.default: batch_norm,
}
