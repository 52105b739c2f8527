"""Integers of a few bits in bytes, as ONNX Runtime's MatMulNBits reads them.

``packed`` uint8 [out, groups, group · bits / 8]: each integer is stored as itself plus 2^(bits-1), of two of 4 bits in one byte
the first is the low half. Zero points lie likewise along a row, [out, ⌈groups · bits / 8⌉]; those of a table that rows are looked up in
have a byte each, as GatherBlockQuantized takes the same bytes in three axes.

Source: the schema of com.microsoft.MatMulNBits in onnxruntime 1.31.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calque.quantization import dequantize


def pack(q: Tensor, bits: int, group: int) -> Tensor:
    """Return signed integers [out, in] as bytes, [out, in / group, group · bits / 8]."""
    return _bytes(q, bits).reshape(q.shape[0], q.shape[1] // group, group * bits // 8)


def pack_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """Return signed zero points [out, groups] as bytes, [out, ⌈groups · bits / 8⌉]."""
    odd = bits == 4 and zero_point.shape[1] % 2 == 1
    return _bytes(torch.nn.functional.pad(zero_point, (0, 1)) if odd else zero_point, bits)


def zero_point_bytes(zero_point: Tensor, bits: int) -> Tensor:
    """Return signed zero points [out, groups] as one byte each, which lookups want."""
    return (zero_point + (1 << (bits - 1))).view(torch.uint8) if bits == 4 else _bytes(zero_point, bits)


def _bytes(q: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return q.view(torch.uint8) ^ 128  # plus 128, in eight bits
    unsigned = (q + 8).view(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` signed integers, int8 [out, count], of bytes [out, …]."""
    flat = packed.reshape(packed.shape[0], -1)
    if bits == 4:
        flat = torch.stack([flat & 15, flat >> 4], -1).reshape(packed.shape[0], -1)
    kept = flat[:, :count]
    return (kept ^ 128).view(torch.int8) if bits == 8 else kept.view(torch.int8) - 8


def unpacked_weight(packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int) -> Tensor:
    """Return the float weight [out, in] that bytes, scales and zero points stand for."""
    groups = scale.shape[1]
    q = unpack(packed, bits, groups * group)
    return dequantize(q, scale, None if zero_point is None else unpack(zero_point, bits, groups), group)
