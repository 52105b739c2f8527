"""Operators of ATen that arrange, cut, join and make values, in those of MIL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any

import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from torch.fx import Node

from calque.targets._coreml_function import DTYPES, Building, Rule, elements, rank, same
from calque.targets._coreml_operators import dtype_of

aten = torch.ops.aten
# No slice of torch's ends here; it is what says that one goes to the end.
END = 2**31 - 1


def reshaped(f: Building, node: Node, x: Any, *_: Any) -> Any:
    """Return the value in the shape of the node's own value."""
    before, after = f.dims(x), f.dims(node)
    value = f.value(x)
    if len(before) == len(after) and all(map(same, before, after)):
        return value
    return mb.reshape(x=value, shape=f.shape(after))


def expand(f: Building, node: Node, x: Any, *_: Any) -> Any:
    """Return the value repeated along axes of length 1."""
    before, after = f.dims(x), f.dims(node)
    value = f.value(x)
    if len(before) < len(after):
        value = mb.expand_dims(x=value, axes=list(range(len(after) - len(before))))
        before = [1] * (len(after) - len(before)) + before
    times = [1 if same(one, other) else other for one, other in zip(before, after, strict=True)]
    return value if all(time == 1 for time in times) else mb.tile(x=value, reps=f.shape(times, inferred=False))


def repeat(f: Building, node: Node, x: Any, times: Sequence[Any]) -> Any:
    """Return the value so many times along each axis."""
    value, more = f.value(x), len(times) - rank(x)
    value = mb.expand_dims(x=value, axes=list(range(more))) if more else value
    counts = [f.dim(time.meta["val"] if isinstance(time, Node) else time) for time in times]
    return mb.tile(x=value, reps=f.shape(counts, inferred=False))


def permute(f: Building, node: Node, x: Any, axes: Sequence[int]) -> Any:
    """Return the value with its axes in another order."""
    return mb.transpose(x=f.value(x), perm=[axis % rank(x) for axis in axes])


def transpose(f: Building, node: Node, x: Any, one: int = 0, other: int = 1) -> Any:
    """Return the value with two axes exchanged."""
    axes = list(range(rank(x)))
    axes[one], axes[other] = axes[other], axes[one]
    return mb.transpose(x=f.value(x), perm=axes)


def unsqueeze(f: Building, node: Node, x: Any, axis: int) -> Any:
    """Return the value with one axis more."""
    value = f.value(x)
    return mb.reshape(x=value, shape=np.array([1], np.int32)) if rank(x) == 0 else mb.expand_dims(x=value, axes=[axis % rank(node)])


def squeeze(f: Building, node: Node, x: Any, axes: Any = None) -> Any:
    """Return the value without axes of length 1."""
    wanted = range(rank(x)) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = [axis % rank(x) for axis in wanted if f.dims(x)[axis] == 1]
    return mb.squeeze(x=f.value(x), axes=gone) if gone else f.value(x)


def cut(f: Building, node: Node, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Return a slice along one axis."""
    size, axis = f.dims(x)[axis], axis % rank(x)
    begin, stop = _place(f, start, 0), _place(f, end, END)
    if isinstance(size, int) and isinstance(begin, int) and isinstance(stop, int):
        begin, stop, _ = slice(begin, stop).indices(size)
        if (begin, stop, step) == (0, size, 1):
            return f.value(x)
    whole = [True] * rank(x)
    whole[axis] = False
    last = list(whole)
    if isinstance(stop, int) and stop >= END:
        last[axis], stop = True, 0
    ends = [0] * rank(x), [0] * rank(x)
    ends[0][axis], ends[1][axis] = begin, stop
    steps = [1] * rank(x)
    steps[axis] = step
    return mb.slice_by_index(x=f.value(x), begin=f.shape(ends[0], False), end=f.shape(ends[1], False), stride=steps, begin_mask=whole,
                             end_mask=last)  # fmt: skip


def _place(f: Building, place: Any, missing: int) -> Any:
    """Return a place along an axis as a number or an expression."""
    if place is None:
        return missing
    value = place.meta["val"] if isinstance(place, Node) else place
    found = f.dim(value)
    return min(found, END) if isinstance(found, int) else found


def select(f: Building, node: Node, x: Any, axis: int, place: Any) -> Any:
    """Return what stands at one place of an axis, without that axis."""
    axis = axis % rank(x)
    at = _place(f, place, 0)
    squeezed, whole = [False] * rank(x), [True] * rank(x)
    squeezed[axis], whole[axis] = True, False
    begin: list[Any] = [0] * rank(x)
    begin[axis] = at
    return mb.slice_by_index(x=f.value(x), begin=f.shape(begin, False), end=f.shape(begin, False), begin_mask=whole, end_mask=whole,
                             squeeze_mask=squeezed)  # fmt: skip


def split(f: Building, node: Node, x: Any, sizes: Any, axis: int = 0) -> list[Any]:
    """Return the pieces that the node's value says."""
    pieces = [int(f.dim(piece.shape[axis])) for piece in node.meta["val"]]
    return list(mb.split(x=f.value(x), split_sizes=pieces, axis=axis % rank(x))) if len(pieces) > 1 else [f.value(x)]


def unbind(f: Building, node: Node, x: Any, axis: int = 0) -> list[Any]:
    """Return what stands at each place of an axis."""
    return [select(f, node, x, axis, place) for place in range(f.dims(x)[axis])]


def concatenated(f: Building, node: Node, parts: Sequence[Any], axis: int = 0) -> Any:
    """Return values one after the other; those without an element are left out."""
    kept = [part for part in parts if elements(f.dims(part)) != 0]
    values = [f.as_type(f.value(part), dtype_of(node)) for part in kept]
    return values[0] if len(values) == 1 else mb.concat(values=values, axis=axis % rank(node))


def stack(f: Building, node: Node, parts: Sequence[Any], axis: int = 0) -> Any:
    """Return values beside each other along a new axis."""
    return mb.stack(values=[f.as_type(f.value(part), dtype_of(node)) for part in parts], axis=axis % rank(node))


def arange(f: Building, node: Node, *numbers: Any, **_: Any) -> Any:
    """Return numbers one after the other."""
    start, end, step = {1: (0, *numbers, 1), 2: (*numbers, 1)}.get(len(numbers), numbers)
    dtype = dtype_of(node)
    ends = [f.scalar(part.meta["val"]) if isinstance(part, Node) else f.value(part) for part in (start, end, step)]
    if not any(hasattr(part, "dtype") for part in ends):
        return mb.const(val=np.arange(*ends, dtype=DTYPES[dtype]))
    begin, stop, by = (f.as_type(part, dtype) for part in ends)
    return mb.range_1d(start=begin, end=stop, step=by)


def full(f: Building, node: Node, *arguments: Any, **_: Any) -> Any:
    """Return a shape filled with one number; the number is the second argument, where there is one."""
    packet: Any = getattr(node.target, "overloadpacket", None)
    number = {aten.zeros: 0, aten.ones: 1, aten.new_zeros: 0, aten.new_ones: 1, aten.zeros_like: 0, aten.ones_like: 1}.get(packet)
    if number is None:
        number = arguments[2] if packet is aten.new_full else arguments[1]
    value = f.as_type(f.value(number), dtype_of(node))
    sizes = f.dims(node)
    if (count := elements(sizes)) is not None and count < 64:
        return mb.const(val=np.full(sizes, value) if sizes else value)
    return mb.fill(shape=f.shape(sizes, inferred=False), value=value)


def scalar_tensor(f: Building, node: Node, number: Any, **_: Any) -> Any:
    """Return a number as a value."""
    value = f.value(number) if not isinstance(number, Node) or number in f.values else f.scalar(number.meta["val"])
    made = f.as_type(value, dtype_of(node))
    return mb.const(val=made) if isinstance(made, np.generic) else made


def index_select(f: Building, node: Node, x: Any, axis: int, places: Any) -> Any:
    """Return what stands at some places of an axis."""
    return _looked_up(f, node, x, lambda value: mb.gather(x=value, indices=f.value(places), axis=axis % rank(x)))


def index(f: Building, node: Node, x: Any, places: Sequence[Any]) -> Any:
    """Return what stands at places of one axis, or of the first ones together."""
    named = [(axis, place) for axis, place in enumerate(places) if place is not None]
    if len(named) == 1:
        return index_select(f, node, x, *named[0])
    if [axis for axis, _ in named] != list(range(len(named))):
        raise ValueError("places of axes that do not follow each other are not translated")
    shapes = [place.meta["val"].shape for _, place in named]
    sizes = [f.dim(size) for size in torch.broadcast_shapes(*shapes)]  # type: ignore[no-untyped-call]
    apart = [_broadcast(f, place, sizes) for _, place in named]
    return _looked_up(f, node, x, lambda value: mb.gather_nd(x=value, indices=mb.stack(values=apart, axis=len(sizes))))


def gather(f: Building, node: Node, x: Any, axis: int, places: Any, **_: Any) -> Any:
    """Return for each place what stands there along an axis."""
    return _looked_up(f, node, x, lambda value: mb.gather_along_axis(x=value, indices=f.value(places), axis=axis % rank(x)))


def _looked_up(f: Building, node: Node, x: Node, found: Callable[[Any], Any]) -> Any:
    """Return what is looked up in a value; in MIL truths cannot be, so they are numbers meanwhile."""
    truths = dtype_of(node) == torch.bool
    value = found(f.as_type(f.value(x), torch.int32 if truths else dtype_of(node)))
    return f.as_type(value, dtype_of(node))


def _broadcast(f: Building, node: Node, sizes: Sequence[Any]) -> Any:
    """Return a value of whole numbers in a shape that it can be broadcast to."""
    if f.dims(node) == list(sizes):
        return f.value(node)
    return mb.add(x=f.value(node), y=mb.fill(shape=f.shape(sizes, inferred=False), value=np.int32(0)))


def unchanged(f: Building, node: Node, x: Any, **_: Any) -> Any:
    """Return the value itself."""
    return f.value(x)


SHAPES: Mapping[Any, Rule] = {
    getitem: lambda f, node, parts, at: f.value(parts)[at],
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints), reshaped),
    aten.unflatten.int: reshaped,
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: transpose,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.default: squeeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.slice.Tensor: cut,
    aten.narrow.default: lambda f, node, x, axis, start, size: cut(f, node, x, axis, start, start + size),
    aten.select.int: select,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split,
    aten.chunk.default: split,
    aten.unbind.int: unbind,
    aten.cat.default: concatenated,
    aten.stack.default: stack,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), arange),
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default, aten.full_like.default, aten.zeros_like.default), full),
    **dict.fromkeys((aten.ones_like.default, aten.new_ones.default, aten.new_zeros.default, aten.new_full.default), full),
    aten.scalar_tensor.default: scalar_tensor,
    aten.index_select.default: index_select,
    aten.index.Tensor: index,
    aten.gather.default: gather,
    **dict.fromkeys(
        (aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default), lambda f, node, x, **_: f.value(x)
    ),
}
