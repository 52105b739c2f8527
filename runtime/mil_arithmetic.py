"""MIL's operators that compute: elementwise, activations, reductions, products and normalisation.

Each takes the parameters of its operator by name, as arrays; what is float16 comes as float32, and the caller rounds what is
returned to the type that the program declares. So every operator rounds once, and overflows where its result leaves float16:
Core ML, too, sums wider than it stores.

Source: the docstrings of coremltools/converters/mil/mil/ops/defs of coremltools@9.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

Array = Any  # an array of numpy's, or a number of it
Kernel = Callable[..., Any]


def unary(function: Callable[[Array], Array]) -> Kernel:
    """Return the kernel of an operator with ``x`` alone."""
    return lambda x: function(x)


def binary(function: Callable[[Array, Array], Array]) -> Kernel:
    """Return the kernel of an operator with ``x`` and ``y``, broadcast."""
    return lambda x, y: function(x, y)


@cache
def erf_table() -> tuple[Array, Array]:
    """Return 65537 points from 0 to 6 and the error function there; a line between two is off by less than 1.1e-9."""
    points = np.linspace(0, 6, 65537)
    return points, np.array([math.erf(point) for point in points.tolist()])


def erf(x: Array) -> Array:
    """Return the error function of each element in float64, to less than float32 can tell."""
    return np.copysign(np.interp(np.abs(x), *erf_table()), x)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + e^-x); e to a large power is infinite, and its share zero."""
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    """Return log(1 + e^x), which is x where x is large."""
    return np.logaddexp(x, np.zeros((), x.dtype))


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Return x by the share of a normal distribution below it, exact or by one of two approximations."""
    if mode == "EXACT":
        return 0.5 * x * (1 + erf(x / np.float32(math.sqrt(2))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    raise ValueError(f"no gelu is called {mode}")


def softmax(x: Array, axis: Any = -1) -> Array:
    """Return the share of each e^x along an axis; a line that is -inf throughout has none, and is NaN."""
    risen = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return risen / risen.sum(axis=int(axis), keepdims=True)


def clip(x: Array, alpha: Any, beta: Any) -> Array:
    """Return x, at least alpha and at most beta."""
    return np.minimum(np.maximum(x, alpha), beta)


def elu(x: Array, alpha: Any) -> Array:
    """Return x above zero, else alpha (e^x - 1)."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def along_channels(x: Array, values: Any) -> Array:
    """Return one value for each channel, the second axis, to broadcast against ``x``."""
    return np.reshape(values, (-1,) + (1,) * (x.ndim - 2))


def prelu(x: Array, alpha: Any) -> Array:
    """Return x above zero, else x by its channel's alpha."""
    return np.where(x > 0, x, along_channels(x, alpha) * x)


def power(x: Array, y: Array) -> Array:
    """Return x to the power of y; whole numbers are raised as real ones, so that a negative power is no error."""
    if np.issubdtype(x.dtype, np.integer):
        return np.power(x.astype(np.float64), y)
    return np.power(x, y)


def divided(x: Array, y: Array) -> Array:
    """Return x / y; of whole numbers, what is left after the point is dropped by the caller."""
    return np.true_divide(x, y)


def axes_of(x: Array, axes: Any) -> tuple[int, ...]:
    """Return the axes that are named, or all of them."""
    return tuple(range(x.ndim)) if axes is None else tuple(int(axis) for axis in np.ravel(axes))


def reduction(function: Callable[..., Array]) -> Kernel:
    """Return the kernel of an operator that reduces axes with a function of numpy's arguments."""
    return lambda x, axes=None, keep_dims=False: function(x, axis=axes_of(x, axes), keepdims=bool(keep_dims))


def index_reduction(function: Callable[..., Array]) -> Kernel:
    """Return the kernel of an operator that gives the place of an element along an axis."""

    def kernel(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Array:
        return function(x, axis=int(axis), keepdims=bool(keep_dims))

    return kernel


def log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """Return log(sum(e^x)), of which no part is infinite where the result is not."""
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    summed = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return summed if keepdims else summed.squeeze(axis)


def linear(x: Array, weight: Array, bias: Any = None) -> Array:
    """Return x by the transposed weight, and the bias added."""
    found = x @ weight.T
    return found if bias is None else found + bias


def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """Return the product of matrices, others of the leading axes broadcast."""
    if transpose_x and x.ndim > 1:
        x = np.swapaxes(x, -1, -2)
    if transpose_y and y.ndim > 1:
        y = np.swapaxes(y, -1, -2)
    return np.matmul(x, y)


def einsum(values: Sequence[Array], equation: str) -> Array:
    """Return the sum of products that an equation says; a length of 1 is broadcast."""
    return np.einsum(equation, *values)


def attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """Return softmax(Q Kᵀ / √E + mask) V; False in a mask of booleans is -inf."""
    scores = np.matmul(query, np.swapaxes(key, -1, -2)) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, np.float32(-np.inf)) if attn_mask.dtype == np.bool_ else scores + attn_mask
    return np.matmul(softmax(scores), value)


def layer_norm(x: Array, axes: Any = None, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Array:
    """Return x with mean 0 and variance 1 over axes, scaled by gamma and moved by beta, which are of those axes' shape."""
    over = tuple(axis % x.ndim for axis in axes_of(x, axes))
    centred = x - x.mean(axis=over, keepdims=True)
    normal = centred / np.sqrt((centred * centred).mean(axis=over, keepdims=True) + np.float32(epsilon))
    shape = [length if axis in over else 1 for axis, length in enumerate(x.shape)]
    if gamma is not None:
        normal = normal * np.reshape(gamma, shape)
    return normal if beta is None else normal + np.reshape(beta, shape)


def batch_norm(x: Array, mean: Array, variance: Array, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Array:
    """Return x moved and scaled by its channel's mean and variance, then by gamma and beta."""
    scale = 1 / np.sqrt(variance + np.float32(epsilon))
    scale = scale if gamma is None else gamma * scale
    found = (x - along_channels(x, mean)) * along_channels(x, scale)
    return found if beta is None else found + along_channels(x, beta)


def instance_norm(x: Array, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Array:
    """Return x with mean 0 and variance 1 over each channel of each sample."""
    found = layer_norm(x, np.arange(2, x.ndim), epsilon=epsilon)
    if gamma is not None:
        found = found * along_channels(x, gamma)
    return found if beta is None else found + along_channels(x, beta)


def l2_norm(x: Array, epsilon: Any = 1e-6) -> Array:
    """Return x divided by the root of the sum of squares of its last three axes."""
    return x / np.sqrt((x * x).sum(axis=(-3, -2, -1), keepdims=True) + np.float32(epsilon))


def local_response_norm(x: Array, size: Any, alpha: Any = 1e-4, beta: Any = 0.75, k: Any = 1.0) -> Array:
    """Return x divided by what its neighbouring channels are."""
    before = int(size) // 2
    padding = [(0, 0)] * x.ndim
    padding[1] = (before, int(size) - 1 - before)
    squares = np.pad(x * x, padding)
    summed = sum(squares[:, shift : shift + x.shape[1]] for shift in range(int(size)))
    return x / np.power(np.float32(k) + np.float32(alpha) / np.float32(size) * summed, np.float32(beta))


def cumsum(x: Array, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    """Return sums of all elements up to each along an axis, without it itself where they are exclusive."""
    axis = int(axis)
    turned = np.flip(x, axis) if reverse else x
    summed = np.cumsum(turned, axis=axis, dtype=x.dtype)
    summed = summed - turned if exclusive else summed
    return np.flip(summed, axis) if reverse else summed


ARITHMETIC: dict[str, Kernel] = {
    "abs": unary(np.abs),
    "acos": unary(np.arccos),
    "asin": unary(np.arcsin),
    "atan": unary(np.arctan),
    "atanh": unary(np.arctanh),
    "ceil": unary(np.ceil),
    "cos": unary(np.cos),
    "cosh": unary(np.cosh),
    "erf": unary(erf),
    "exp": unary(np.exp),
    "exp2": unary(np.exp2),
    "floor": unary(np.floor),
    "round": unary(np.round),
    "sign": unary(np.sign),
    "sin": unary(np.sin),
    "sinh": unary(np.sinh),
    "sqrt": unary(np.sqrt),
    "square": unary(np.square),
    "tan": unary(np.tan),
    "tanh": unary(np.tanh),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + np.float32(epsilon)),
    "log": lambda x, epsilon=1e-45: np.log(x + np.float32(epsilon)),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + np.float32(epsilon)),
    "threshold": lambda x, alpha: np.maximum(x, alpha),
    "clip": clip,
    "logical_not": unary(np.logical_not),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: clip(x, 0, 6),
    "clamped_relu": lambda x, alpha, beta: np.minimum(np.where(x >= 0, x, alpha * x), beta),
    "elu": elu,
    "gelu": gelu,
    "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "linear_activation": lambda x, alpha, beta=0.0: x * alpha + beta,
    "prelu": prelu,
    "scaled_tanh": lambda x, alpha=1.0, beta=1.0: alpha * np.tanh(beta * x),
    "sigmoid": unary(sigmoid),
    "sigmoid_hard": lambda x, alpha=0.2, beta=0.5: clip(alpha * x + beta, 0, 1),
    "silu": lambda x: x * sigmoid(x),
    "softmax": softmax,
    "softplus": unary(softplus),
    "softplus_parametric": lambda x, alpha, beta: along_channels(x, alpha) * softplus(along_channels(x, beta) * x),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "thresholded_relu": lambda x, alpha: np.where(x >= alpha, x, 0),
    "add": binary(np.add),
    "sub": binary(np.subtract),
    "mul": binary(np.multiply),
    "real_div": binary(divided),
    "floor_div": binary(np.floor_divide),
    "mod": binary(np.mod),
    "pow": binary(power),
    "maximum": binary(np.maximum),
    "minimum": binary(np.minimum),
    "equal": binary(np.equal),
    "not_equal": binary(np.not_equal),
    "greater": binary(np.greater),
    "greater_equal": binary(np.greater_equal),
    "less": binary(np.less),
    "less_equal": binary(np.less_equal),
    "logical_and": binary(np.logical_and),
    "logical_or": binary(np.logical_or),
    "logical_xor": binary(np.logical_xor),
    "reduce_argmax": index_reduction(np.argmax),
    "reduce_argmin": index_reduction(np.argmin),
    "reduce_l1_norm": reduction(lambda x, **over: np.abs(x).sum(**over)),
    "reduce_l2_norm": reduction(lambda x, **over: np.sqrt((x * x).sum(**over))),
    "reduce_log_sum": reduction(lambda x, **over: np.log(x.sum(**over))),
    "reduce_log_sum_exp": reduction(log_sum_exp),
    "reduce_max": reduction(np.max),
    "reduce_mean": reduction(np.mean),
    "reduce_min": reduction(np.min),
    "reduce_prod": reduction(np.prod),
    "reduce_sum": reduction(np.sum),
    "reduce_sum_square": reduction(lambda x, **over: (x * x).sum(**over)),
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "local_response_norm": local_response_norm,
    "cumsum": cumsum,
}
