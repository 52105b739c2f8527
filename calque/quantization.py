"""Weights as integers, or as numbers of 8 bits: how weights become them, and numbers again. Tensors alone; graphs are the passes' business.

A weight is [out, in]. Its integers are signed, unpacked and of the same shape, int8 whatever their bits; each group of
``group`` neighbours along ``in`` has a scale, and a zero point where they are asymmetric:

    weight = (q - zero_point) * scale        q in [-2^(bits-1), 2^(bits-1) - 1]

Of the format e4m3, q is float8_e4m3fn instead, from -448 to 448, and no zero points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]
Format = Literal["integers", "e4m3"]

# The shortest group that runtimes have kernels for.
SHORTEST_GROUP = 16
# And the longest. Source: MatMulNBits of onnxruntime@1.31.
LONGEST_GROUP = 256
# The largest number of float8_e4m3fn; what is larger becomes no number. Source: OCP 8-bit Floating Point Specification 1.0, section 5.
LARGEST_E4M3 = 448.0
# By how much the range of a group is narrowed, to see whether finer steps win more than what is clipped loses.
NARROWER = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Elements that are searched at a time: what is made of them fits the second cache of a processor.
PIECE = 1 << 17


@dataclass(frozen=True)
class Scheme:
    """How one weight is quantized. ``group`` 0: one scale an output. ``search``: narrower ranges are tried as well.

    ``format``: what numbers in so many bits are; e4m3 has 8 of them and is symmetric.
    """

    bits: Bits = 4
    group: int = 32
    symmetric: bool = True
    search: bool = True
    format: Format = "integers"

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds q, one value an element."""
        return torch.float8_e4m3fn if self.format == "e4m3" else torch.int8

    def fitted(self, size: int) -> Scheme | None:
        """Return the scheme with a group that divides ``size``, a power of two; None where that would be too short."""
        if not self.group:
            return self
        group = min(self.group, size & -size)
        return replace(self, group=group) if group >= SHORTEST_GROUP else None

    def block(self, size: int) -> int:
        """Return how many of ``size`` neighbours operators take together that know groups alone: a whole row is several then."""
        return self.group or min(size & -size, LONGEST_GROUP)

    def __str__(self) -> str:
        """Return the scheme as one word, ``int4-g32``."""
        name = "fp" if self.format == "e4m3" else "int"
        return f"{name}{self.bits}{'' if self.symmetric else '-asymmetric'}{f'-g{self.group}' if self.group else ''}"


@dataclass(frozen=True)
class Quantized:
    """Integers [out, in] int8, or numbers float8_e4m3fn; scales [out, groups] float32, zero points [out, groups] int8 or None."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None


def bounds(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest integer of so many bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    """Return the weight [out, in] float32 that the integers stand for; ``group`` 0 is a whole row."""
    grouped = q.to(torch.float32).reshape(q.shape[0], -1, group or q.shape[1])
    if zero_point is not None:
        grouped = grouped - zero_point.to(torch.float32).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).reshape(q.shape)


def quantize(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Return the nearest integers of a weight [out, in]; ``group`` must divide ``in``.

    ``importance`` [in]: how much the error of each input counts in the search, all alike where None.

    Source: round to nearest; the search over clipped ranges as in AWQ (arXiv 2306.00978, section 3).
    """
    rows, columns = weight.shape
    group = scheme.group or columns
    q = torch.empty(rows, columns, dtype=scheme.dtype)
    scale = torch.empty(rows, columns // group)
    zero = None if scheme.symmetric else torch.empty(rows, columns // group, dtype=torch.int8)
    counts = None if importance is None else importance.to(torch.float32).reshape(-1, group)
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        grouped = weight[part].to(torch.float32).reshape(-1, columns // group, group)
        chosen_scale, chosen_zero = ranges(grouped, scheme, counts)
        q[part] = nearest(grouped, chosen_scale, chosen_zero, scheme).reshape(-1, columns).to(scheme.dtype)
        scale[part] = chosen_scale.squeeze(-1)
        if zero is not None and chosen_zero is not None:
            zero[part] = chosen_zero.squeeze(-1).to(torch.int8)
    return Quantized(q, scale, zero)


def ranges(grouped: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of each group [rows, groups, 1]: those of the whole range, or of the best narrower one."""
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale, zero = _steps(low, high, scheme)
    if not scheme.search:
        return scale, zero
    best = _error(grouped, scale, zero, scheme, importance)
    for ratio in NARROWER:
        other_scale, other_zero = _steps(low * ratio, high * ratio, scheme)
        error = _error(grouped, other_scale, other_zero, scheme, importance)
        better = error < best
        scale, best = torch.where(better, other_scale, scale), torch.where(better, error, best)
        if zero is not None and other_zero is not None:
            zero = torch.where(better, other_zero, zero)
    return scale, zero


def _steps(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Return the scale, above 0, and the zero point with which the integers reach from ``low`` to ``high``."""
    smallest, largest = (-LARGEST_E4M3, LARGEST_E4M3) if scheme.format == "e4m3" else bounds(scheme.bits)
    if scheme.symmetric:
        scale = torch.maximum(high / largest, low / smallest)
        return torch.where(scale > 0, scale, 1.0), None
    low, high = low.clamp(max=0), high.clamp(min=0)  # so that 0 is an integer
    scale = (high - low) / (largest - smallest)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (smallest - low / scale).round_().clamp_(smallest, largest)


def nearest(grouped: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Return the nearest integers, or numbers of the scheme's format, as floats."""
    if scheme.format == "e4m3":
        return round_e4m3(grouped / scale)
    steps = (grouped / scale).round_()
    return (steps if zero is None else steps.add_(zero)).clamp_(*bounds(scheme.bits))


def round_e4m3(x: Tensor) -> Tensor:
    """Return the nearest numbers that float8_e4m3fn has, float32; what lies outside is the largest."""
    return x.to(torch.float32).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).to(torch.float32)


def narrow_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in a narrower type, none of them 0: a scale that small would make no numbers of anything."""
    known = torch.finfo(dtype)
    return scale.to(torch.float32).clamp(known.tiny * known.eps, known.max).to(dtype)


def _error(grouped: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, importance: Tensor | None) -> Tensor:
    """Return the squared error of each group, [rows, groups, 1]."""
    steps = nearest(grouped, scale, zero, scheme)
    if zero is not None:
        steps -= zero
    squared = steps.mul_(scale).sub_(grouped).square_()
    return (squared if importance is None else squared.mul_(importance)).sum(-1, keepdim=True)


def round_blocks(x: Tensor, block: int) -> Tensor:
    """Return the values as 8 bits hold them, each block of the last axis with a scale of its own, the largest being 127.

    Source: ``QuantizeARow`` of MLAS in onnxruntime@1.31, which MatMulNBits calls where its accuracy level is 4.
    """
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scale > 0, blocks / scale, 0.0).round() * scale).reshape(x.shape)
