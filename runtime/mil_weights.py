"""MIL's operators of quantised values: weights that are made dense when a program is opened, and activations.

Source: the docstrings of coremltools/converters/mil/mil/ops/defs of coremltools@9.0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from calque.runtime.mil_arithmetic import Array, Kernel
from calque.runtime.mil_file import unpacked
from calque.runtime.mil_layout import ints

# What of a program is computed once, when it is opened.
CONSTANT = "constexpr_"


def along(x: Array, values: Any, axis: Any) -> Array:
    """Return one value, or one for each place along an axis, to broadcast against x."""
    if np.ndim(values) == 0 or np.size(values) == 1:
        return np.reshape(values, ()).astype(np.float32)
    shape = [1] * x.ndim
    shape[int(axis)] = -1
    return np.reshape(values, shape).astype(np.float32)


def affine_dequantize(quantized_data: Array, zero_point: Any, scale: Any, axis: Any) -> Array:
    """Return scale (data - zero_point)."""
    return dequantize(quantized_data, scale, zero_point, axis)


def dequantize(input: Array, scale: Any, zero_point: Any = None, axis: Any = None) -> Array:
    """Return scale (input - zero_point); both are one value, or one for each place along an axis."""
    centred = input.astype(np.float32)
    if zero_point is not None:
        centred = centred - along(input, zero_point, axis)
    return along(input, scale, axis) * centred


def quantize(input: Array, scale: Any, output_dtype: str, zero_point: Any = None, axis: Any = None) -> Array:
    """Return round(input / scale) + zero_point, as near as the type holds."""
    found = np.round(input / along(input, scale, axis))
    if zero_point is not None:
        found = found + along(input, zero_point, axis)
    limits = np.iinfo(output_dtype)
    return np.clip(found, limits.min, limits.max)


def spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Return one value of each block for every element of the block."""
    for axis, (length, count) in enumerate(zip(shape, blocks.shape, strict=True)):
        if length % count:
            raise ValueError(f"{count} blocks of an axis of {length}")
        if count not in (1, length):
            blocks = np.repeat(blocks, length // count, axis)
    return blocks


def blockwise_shift_scale(data: Array, scale: Array, offset: Any = None) -> Array:
    """Return scale (data - offset), of which each block of data has its own."""
    centred = data.astype(np.float32)
    if offset is not None:
        centred = centred - spread(offset, data.shape).astype(np.float32)
    return centred * spread(scale, data.shape).astype(np.float32)


def looked_up(indices: Array, lut: Array, places: tuple[Array, ...], shape: tuple[int, ...]) -> Array:
    """Return the vector that each index names in the table of its block; ``places`` are where in ``shape`` indices stand."""
    tables = lut.reshape(-1, *lut.shape[-2:])
    block: Array = 0
    for place, length, count in zip(places, shape, lut.shape[:-2], strict=True):
        if length % count:
            raise ValueError(f"{count} tables along an axis of {length}")
        block = block * count + place // (length // count)
    return tables[block, indices]


def vectors_along(values: Array, axis: Any) -> Array:
    """Return vectors, the last axis of ``values``, laid out along another axis, which is longer by their length."""
    size = values.shape[-1]
    if size == 1:
        return values[..., 0]
    axis = int(axis) % (values.ndim - 1)
    shape = list(values.shape[:-1])
    shape[axis] *= size
    return np.moveaxis(values, -1, axis + 1).reshape(shape)


def lut_to_dense(indices: Array, lut: Array, shape: Any = None, vector_axis: Any = None) -> Array:
    """Return what indices name: in one table, packed, with the shape beside them (iOS 16), or in one of each block (iOS 18)."""
    if shape is not None:
        lengths, bits = ints(shape), max(round(math.log2(lut.size)), 1)
        return lut[unpacked(indices, bits, math.prod(lengths))].reshape(lengths)
    return vectors_along(looked_up(indices, lut, tuple(np.indices(indices.shape, sparse=True)), indices.shape), vector_axis)


def dense(mask: Array, values: Array) -> Array:
    """Return values where a mask is set, in its order, and zeros elsewhere."""
    found = np.zeros(mask.shape, values.dtype)
    found[mask.astype(bool)] = values
    return found


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Any = None) -> Array:
    """Return data where a mask is set, zeros elsewhere; the mask is of bits in bytes with the shape beside it up to iOS 17."""
    if shape is not None:
        mask = unpacked(mask, 1, math.prod(ints(shape))).reshape(ints(shape))
    return dense(mask, nonzero_data)


def lut_to_sparse(indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Any = None) -> list[Array]:
    """Return the mask of what indices name, and what they name, where a mask says there is one."""
    places = np.nonzero(indices_mask)
    found = looked_up(indices_nonzero_data, lut, places, indices_mask.shape)
    if found.shape[-1] == 1:
        return [indices_mask, found[..., 0]]
    filled = np.zeros((*indices_mask.shape, found.shape[-1]), found.dtype)
    filled[places] = found
    mask = vectors_along(np.broadcast_to(indices_mask[..., None], filled.shape), vector_axis)
    return [mask, vectors_along(filled, vector_axis)[mask.astype(bool)]]


def sparse_blockwise_shift_scale(data_mask: Array, nonzero_data: Array, scale: Array, offset: Any = None) -> list[Array]:
    """Return the mask, and scale (data - offset) where it is set."""
    return [data_mask, blockwise_shift_scale(dense(data_mask, nonzero_data), scale, offset)[data_mask.astype(bool)]]


WEIGHTS: dict[str, Kernel] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": lambda source_val, output_dtype: source_val,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
    "dequantize": dequantize,
    "quantize": quantize,
}
