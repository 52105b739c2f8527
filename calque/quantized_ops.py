"""The semantic operators of 8-bit arithmetic: integers of weights as they are laid out for products, activations that are rounded.

As in ``calque/ops.py`` each has a fake, and a reference in plain tensor operations that is its decomposition as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calque.quantization import LARGEST_E4M3, narrow_scale

# The integers that activations become: 0 to 255 where their zero point is free.
LEVELS = 255


@torch.library.custom_op("calque::dequantize_linear", mutates_args=())
def dequantize_linear(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, group: int) -> Tensor:
    """Return (q - zero_point) · scale, rounded to the type of ``scale``, as ONNX's DequantizeLinear does it.

    q int8 or uint8, unpacked, or float8_e4m3fn; scale of any type, zero_point of q's, of one shape: [] for all of q; [size] along
    ``axis``; where ``group`` is not 0 that of q with each ``group`` neighbours along ``axis`` being one.
    """
    scales, zero = _spread(scale, q, axis, group), None if zero_point is None else _spread(zero_point, q, axis, group)
    number = q.to(torch.float32)
    return ((number if zero is None else number - zero.to(torch.float32)) * scales).to(scale.dtype)


@dequantize_linear.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, group: int) -> Tensor:
    return scale.new_empty(q.shape)


def _spread(part: Tensor, q: Tensor, axis: int, group: int) -> Tensor:
    """Return scales or zero points in a shape that goes with that of q."""
    if group:
        return part.repeat_interleave(group, axis)
    return part.reshape([-1 if at == axis else 1 for at in range(q.dim())]) if part.dim() else part


@torch.library.custom_op("calque::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return what is nearest to x / scale + zero_point in the type of ``zero_point``; both are one number, []. e4m3 has none but 0."""
    steps = x.to(torch.float32) / scale.to(torch.float32)
    if zero_point.dtype == torch.float8_e4m3fn:
        return steps.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(zero_point.dtype)
    known = torch.iinfo(zero_point.dtype)
    return (torch.round(steps) + zero_point.to(torch.float32)).clamp(known.min, known.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=zero_point.dtype)


@dataclass(frozen=True)
class RoundTrip:
    """Rounds a value to 8 bits and back, by a scale and a zero point that are one number each."""

    scale: Tensor
    zero_point: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the value as the operators give it, in float32."""
        scale = self.scale.to(torch.float32)
        rounded: Tensor = dequantize_linear(quantize_linear(x, scale, self.zero_point), scale, self.zero_point, 8, 0, 0)
        return rounded

    def narrowed(self, dtype: torch.dtype) -> RoundTrip:
        """Return what rounds with the scale in a narrower type."""
        return replace(self, scale=narrow_scale(self.scale, dtype))


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, both [], with which 0 to 255 reach from the smallest value to the largest, and over 0.

    Source: DynamicQuantizeLinear-11 of the ONNX standard.
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.round(-low / scale).clamp(0, LEVELS)


@torch.library.custom_op("calque::round_activations", mutates_args=())
def round_activations(x: Tensor) -> Tensor:
    """Return ``x`` rounded to 8 bits between its smallest and its largest value, which all its rows and positions share."""
    if not x.numel():
        return x.clone()
    scale, zero = dynamic_range(x)
    return ((torch.round(x / scale) + zero).clamp(0, LEVELS) - zero) * scale


@round_activations.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("calque::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return round_activations(x) · (q · scale) + bias: x [..., in], q int8 [in, out], scale float32 [out]."""
    rounded: Tensor = round_activations(x)
    out = torch.matmul(rounded, q.to(torch.float32) * scale)
    return out if bias is None else out + bias


@dynamic_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[1])


@torch.library.custom_op("calque::dequantize_lookup", mutates_args=())
def dequantize_lookup(ids: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group: int) -> Tensor:
    """Return what ``ids`` ask for of a table of integers, of the type of ``scale`` [*ids, size].

    An entry is a row of q, int8 or float8_e4m3fn [entries, size], where ``axis`` is 0, and a column where it is 1. Scales and zero
    points lie as the entries do: one each, or one for each ``group`` of its values.
    """
    rows, scales = (q, scale) if axis == 0 else (q.t(), scale if scale.dim() == 1 else scale.t())
    zeros = zero_point if axis == 0 or zero_point is None or zero_point.dim() == 1 else zero_point.t()
    number = rows[ids].to(torch.float32).reshape(*ids.shape, -1, group or rows.shape[1])
    if zeros is not None:
        number = number - zeros[ids].reshape(*number.shape[:-1], 1).to(torch.float32)
    number = number * scales[ids].reshape(*number.shape[:-1], 1)
    return number.reshape(*ids.shape, rows.shape[1]).to(scale.dtype)


@dequantize_lookup.register_fake
def _(ids: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, group: int) -> Tensor:
    return scale.new_empty(*ids.shape, q.shape[1 - axis])
