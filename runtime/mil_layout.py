"""MIL's operators that move values, or make them of shapes and places: nothing is rounded, so float16 stays float16.

Each takes the parameters of its operator by name, as arrays, and changes none of them in place.

Source: the docstrings of coremltools/converters/mil/mil/ops/defs of coremltools@9.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from calque.runtime.mil_arithmetic import Array, Kernel

# How a place that updates are written to is changed; several updates of one place count one after the other.
SCATTER_MODES = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}


def ints(values: Any) -> list[int]:
    """Return whole numbers as Python's."""
    return [int(value) for value in np.ravel(values)]


def checked(indices: Array, length: int, validate_indices: Any) -> Array:
    """Return places along an axis; negative ones count from its end, up to iOS 16, whose operators have no ``validate_indices``.

    Raises:
        IndexError: one is outside of it. MIL leaves what comes of that undefined, so a program that does it has no answer.
    """
    found = np.asarray(indices).astype(np.int64)
    lowest = -length if validate_indices is None else 0
    if found.size and (found.min() < lowest or found.max() >= length):
        raise IndexError(f"places from {found.min()} to {found.max()} along an axis of {length}, where {lowest} is the lowest allowed")
    return np.where(found < 0, found + length, found)


def reshape(x: Array, shape: Any) -> Array:
    """Return x in another shape; 0 takes the length of x that is as far from the right end, 1 where it has none."""
    wanted = ints(shape)
    for place, length in enumerate(wanted):
        if length == 0:
            source = x.ndim - (len(wanted) - place)
            wanted[place] = x.shape[source] if source >= 0 else 1
    return x.reshape(wanted)


def reshape_like(x: Array, ref_tensors: Sequence[Array], begins: Sequence[Any], ends: Sequence[Any], end_masks: Sequence[Any]) -> Array:
    """Return x in a shape put together of pieces of other shapes."""
    shape: list[int] = []
    for reference, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += reference.shape[int(begin) : None if to_end else int(end)]
    return x.reshape(shape)


def expand_dims(x: Array, axes: Any) -> Array:
    """Return x with axes of length 1 put in, at these places of the result."""
    return np.expand_dims(x, tuple(ints(axes)))


def squeeze(x: Array, axes: Any = None) -> Array:
    """Return x without axes of length 1; one that is longer stays."""
    chosen = range(x.ndim) if axes is None else ints(axes)
    return np.squeeze(x, tuple(axis for axis in chosen if x.shape[axis] == 1))


def slices(x: Array, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any) -> tuple[Any, ...]:
    """Return what indexes x: a slice for each axis, or one place where the axis is dropped."""
    rank = x.ndim
    flags = [np.zeros(rank, bool) if mask is None else np.ravel(mask) for mask in (begin_mask, end_mask, squeeze_mask)]
    steps = [1] * rank if stride is None else ints(stride)
    found: list[Any] = []
    for axis, (first, last) in enumerate(zip(ints(begin), ints(end), strict=True)):
        if flags[2][axis]:
            found.append(first)
        else:
            found.append(slice(None if flags[0][axis] else first, None if flags[1][axis] else last, steps[axis]))
    return tuple(found)


def slice_by_index(
    x: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """Return x[begin:end:stride] of every axis."""
    return x[slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Array,
    update: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """Return x with ``update`` where ``x[begin:end:stride]`` was."""
    found = x.copy()
    place = slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if found[place].shape != update.shape:
        raise ValueError(f"an update of shape {update.shape} for a slice of {found[place].shape}")
    found[place] = update
    return found


def slice_by_size(x: Array, begin: Any, size: Any) -> Array:
    """Return ``size`` elements of each axis from ``begin``; -1 is all that follow."""
    pairs = zip(ints(begin), ints(size), x.shape, strict=True)
    return x[tuple(slice(first, length if count == -1 else first + count) for first, count, length in pairs)]


def split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> list[Array]:
    """Return parts of x along an axis, of these sizes or equal."""
    if split_sizes is None:
        return np.split(x, int(num_splits), int(axis))
    sizes = ints(split_sizes)
    if sum(sizes) != x.shape[int(axis)]:
        raise ValueError(f"parts of {sizes} of an axis of {x.shape[int(axis)]}")
    return np.split(x, np.cumsum(sizes)[:-1], int(axis))


def concat(values: Sequence[Array], axis: Any, interleave: Any = False) -> Array:
    """Return arrays one after the other along an axis, or one element of each in turn; a scalar counts as one element."""
    values = [np.atleast_1d(value) for value in values]
    if not interleave:
        return np.concatenate(values, int(axis))
    place = int(axis) % values[0].ndim
    shape = list(values[0].shape)
    shape[place] *= len(values)
    return np.stack(values, place + 1).reshape(shape)


def pad(x: Array, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Return x with elements before and after its last axes."""
    amounts = np.reshape(ints(pad), (-1, 2)).tolist()
    widths = [[0, 0]] * (x.ndim - len(amounts)) + amounts
    if mode == "constant":
        return np.pad(x, widths, constant_values=np.asarray(constant_val).astype(x.dtype))
    how: Any = {"reflect": "reflect", "replicate": "edge"}[mode]
    return np.pad(x, widths, mode=how)


def gather(x: Array, indices: Any, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = None) -> Array:
    """Return elements of x at places along an axis; of the leading ``batch_dims`` axes, places of each are its own."""
    axis, batch = int(axis) % x.ndim, int(batch_dims)
    places = checked(indices, x.shape[axis], validate_indices)
    if not batch:
        return np.take(x, places, axis)
    lead = x.shape[:batch]
    flat = x.reshape(-1, *x.shape[batch:])
    rows = places.reshape(-1, *places.shape[batch:])
    taken = np.stack([np.take(part, row, axis - batch) for part, row in zip(flat, rows, strict=True)])
    return taken.reshape(lead + taken.shape[1:])


def gather_along_axis(x: Array, indices: Any, axis: Any = 0, validate_indices: Any = None) -> Array:
    """Return for each place of ``indices`` the element of x on that line at the place it names."""
    axis = int(axis) % x.ndim
    return np.take_along_axis(x, checked(indices, x.shape[axis], validate_indices), axis)


def nd_places(x: Array, indices: Any, batch: int, validate_indices: Any) -> tuple[Array, ...]:
    """Return what indexes x by the vectors in the last axis of ``indices``, one for each of the leading axes before them."""
    vectors = np.moveaxis(np.asarray(indices), -1, 0)
    named = tuple(checked(part, x.shape[batch + axis], validate_indices) for axis, part in enumerate(vectors))
    lead = np.indices(vectors.shape[1 : 1 + batch])
    return tuple(part.reshape(part.shape + (1,) * (vectors.ndim - 1 - batch)) for part in lead) + named


def gather_nd(x: Array, indices: Any, batch_dims: Any = 0, validate_indices: Any = None) -> Array:
    """Return the slice of x that each vector of ``indices`` names."""
    return x[nd_places(x, indices, int(batch_dims), validate_indices)]


def written(data: Array, place: Any, updates: Array, mode: str) -> Array:
    """Return data changed at places by a mode."""
    found = data.copy()
    if mode == "update":
        found[place] = updates
    else:
        SCATTER_MODES[mode].at(found, place, updates)
    return found


def scatter(data: Array, indices: Any, updates: Array, *, mode: str, axis: Any = 0, validate_indices: Any = None) -> Array:
    """Return data with updates written to places along an axis; of its default mode, documentation and code disagree."""
    axis = int(axis) % data.ndim
    return written(data, (slice(None),) * axis + (checked(indices, data.shape[axis], validate_indices),), updates, mode)


def scatter_along_axis(data: Array, indices: Any, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = None) -> Array:
    """Return data with each update written on its line, to the place that ``indices`` names."""
    axis = int(axis) % data.ndim
    place: list[Any] = list(np.indices(np.shape(indices), sparse=True))
    place[axis] = checked(indices, data.shape[axis], validate_indices)
    return written(data, tuple(place), updates, mode)


def scatter_nd(data: Array, indices: Any, updates: Array, mode: str = "add", validate_indices: Any = None) -> Array:
    """Return data with updates written to the slices that the vectors of ``indices`` name."""
    return written(data, nd_places(data, indices, 0, validate_indices), updates, mode)


def topk(
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> list[Array]:
    """Return the k largest elements along an axis, or smallest, and their places; of equal ones the first; -1 is all."""
    axis, count = int(axis), int(k)
    order = argsort(x, axis, ascending)
    order = np.take(order, np.arange(x.shape[axis] if count == -1 else count), axis)
    values = np.take_along_axis(x, order, axis)
    return [values, order] if return_indices else [values]


def argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    """Return the places of elements along an axis in the order of their values; of equal ones the first comes first."""
    if ascending:
        return np.argsort(x, int(axis), kind="stable")
    # Reversed twice, so that of equal ones the first comes first here too.
    backwards = np.argsort(np.flip(x, int(axis)), int(axis), kind="stable")
    return np.flip(x.shape[int(axis)] - 1 - backwards, int(axis))


def one_hot(indices: Any, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0) -> Array:
    """Return a vector for each place, ``on_value`` there and ``off_value`` elsewhere, along a new axis."""
    places = np.expand_dims(np.asarray(indices), int(axis))
    shape = [1] * places.ndim
    shape[int(axis)] = int(one_hot_vector_size)
    return np.where(places == np.arange(int(one_hot_vector_size)).reshape(shape), on_value, off_value)


def band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    """Return x with zeros outside of a band of each matrix."""
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    kept = ((int(lower) < 0) | (rows - columns <= int(lower))) & ((int(upper) < 0) | (columns - rows <= int(upper)))
    return np.where(kept, x, np.zeros((), x.dtype))


def select(cond: Array, a: Any = None, b: Any = None) -> Array:
    """Return a where a condition holds, else b; or, without them, the places where it holds."""
    return np.argwhere(cond) if a is None else np.where(cond, a, b)


def flatten2d(x: Array, axis: Any = 1) -> Array:
    """Return x as a matrix: what stands before an axis, and the rest."""
    place = int(axis) % x.ndim if int(axis) < 0 else int(axis)
    return x.reshape(math.prod(x.shape[:place]), -1)


def depth_to_space(x: Array, block_size: Any) -> Array:
    """Return channels laid out as blocks of a picture, the block's place counted before the channel."""
    block, (batch, depth, height, width) = int(block_size), x.shape
    parts = x.reshape(batch, block, block, depth // block**2, height, width)
    return parts.transpose(0, 3, 4, 1, 5, 2).reshape(batch, depth // block**2, height * block, width * block)


def space_to_depth(x: Array, block_size: Any) -> Array:
    """Return blocks of a picture laid out as channels; the inverse of `depth_to_space`."""
    block, (batch, depth, height, width) = int(block_size), x.shape
    parts = x.reshape(batch, depth, height // block, block, width // block, block)
    return parts.transpose(0, 3, 5, 1, 2, 4).reshape(batch, depth * block**2, height // block, width // block)


def pixel_shuffle(x: Array, upscale_factor: Any) -> Array:
    """Return channels laid out as blocks of a picture, the channel counted before the block's place, as PyTorch does."""
    factor, (batch, depth, height, width) = int(upscale_factor), x.shape
    parts = x.reshape(batch, depth // factor**2, factor, factor, height, width)
    return parts.transpose(0, 1, 4, 2, 5, 3).reshape(batch, depth // factor**2, height * factor, width * factor)


def pixel_unshuffle(x: Array, downscale_factor: Any) -> Array:
    """Return blocks of a picture laid out as channels; the inverse of `pixel_shuffle`."""
    factor, (batch, depth, height, width) = int(downscale_factor), x.shape
    parts = x.reshape(batch, depth, height // factor, factor, width // factor, factor)
    return parts.transpose(0, 1, 3, 5, 2, 4).reshape(batch, depth * factor**2, height // factor, width // factor)


def sliding_windows(x: Array, axis: Any, size: Any, stride: Any = 1) -> Array:
    """Return all windows along an axis, each along a new axis after it."""
    axis = int(axis) % x.ndim
    windows = np.moveaxis(np.lib.stride_tricks.sliding_window_view(x, int(size), axis), -1, axis + 1)
    return np.take(windows, np.arange(0, windows.shape[axis], int(stride)), axis)


def cast(x: Array, dtype: str) -> Array:
    """Return x, which the caller gives the type that is declared; a number is true where it is not zero."""
    return x != 0 if dtype == "bool" else x


LAYOUT: dict[str, Kernel] = {
    "argsort": argsort,
    "band_part": band_part,
    "cast": cast,
    "concat": concat,
    "crop": lambda x, crop_height, crop_width: x[
        ..., int(crop_height[0]) : x.shape[-2] - int(crop_height[1]), int(crop_width[0]) : x.shape[-1] - int(crop_width[1])
    ],
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "fill": lambda shape, value=0.0: np.full(ints(shape), value),
    "fill_like": lambda ref_tensor, value=0.0: np.full(ref_tensor.shape, value),
    "flatten2d": flatten2d,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "identity": lambda x: x,
    "non_zero": lambda x: np.argwhere(x),
    "one_hot": one_hot,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": lambda start, end, step: np.arange(start.item(), end.item(), step.item()),
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": lambda x, axes=None: np.flip(x, None if axes is None else tuple(ints(axes))),
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "select": select,
    "shape": lambda x: np.array(x.shape),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda values, axis: np.stack(values, int(axis)),
    "tile": lambda x, reps: np.tile(x, ints(reps)),
    "topk": topk,
    "transpose": lambda x, perm: np.transpose(x, ints(perm)),
}
