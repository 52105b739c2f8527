"""Makes one operator of the rotation of queries and keys by their positions.

::

    before  add(mul(%x, %cos), mul(cat([neg(%x[h:]), %x[:h]]), %sin))             halves, cos of cat([f, f])
            cat([sub(mul(%a, %cos), mul(%b, %sin)), add(mul(%b, %cos), mul(%a, %sin))])    halves, cos of f
            … with stack, flatten and every second element instead                  interleaved
            cat([any of these on %x[..., :R], %x[..., R:]])                         partial
            any of these on %x [B, S, H, D] with angles [B, S, 1, …]                 heads not yet in front
    after   calque.rotary(%x [B, H, S, D], %cos [B, S, R/2], %sin, interleaved, R)
    or      split_heads(calque.flat_rotary(join_heads(%x [B, S, H, D]), …))
    left    angles that are not one row per batch and position, rotations by complex numbers

The angles stay in the graph, so frequencies may depend on the length. Source: Su et al. 2021, RoFormer; the forms of
transformers@5.23.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import getitem
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Graph, Node

from calque.passes import Rewrites
from calque.patterns import aten, calls, factors, only_user, orders, wave
from calque.traced import call

if TYPE_CHECKING:
    from calque.traced import TracedModel


@dataclass(frozen=True)
class FuseRotary:
    """Every written-out rotation is one operator on angles of half its size."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per rotation."""
        angles, count = _Angles(model), 0
        for node in list(model.graph.nodes):
            found = _rotated_by_halves(node) or _rotated_in_parts(node)
            if found is None:
                continue
            axis = 2 if _heads_behind(found.cos) and _heads_behind(found.sin) else 1
            cos, sin = (angles.of(factor, axis, found.doubled, found.interleaved) for factor in (found.cos, found.sin))
            if cos is None or sin is None:
                continue
            size = 2 * int(cos.meta["val"].shape[-1])
            if found.value.meta["val"].shape[-1] != size:
                continue
            value, last = _whole(found.value, node, size)
            with model.graph.inserting_before(last):
                fused = _fused(model.graph, value, cos, sin, found.interleaved, size, axis)
            last.replace_all_uses_with(fused)
            count += 1
        model.graph.eliminate_dead_code()
        return Rewrites(count, tuple(angles.skipped.items()))


def _fused(graph: Graph, value: Node, cos: Node, sin: Node, interleaved: bool, size: int, axis: int) -> Node:
    """Return the rotation of [B, H, S, D], or of [B, S, H, D] where the heads are axis 2."""
    if axis == 1:
        return call(graph, torch.ops.calque.rotary.default, value, cos, sin, interleaved, size)
    heads = int(value.meta["val"].shape[2])
    flat = call(graph, torch.ops.calque.join_heads.default, value)
    turned = call(graph, torch.ops.calque.flat_rotary.default, flat, cos, sin, interleaved, size, heads)
    return call(graph, torch.ops.calque.split_heads.default, turned, heads)


@dataclass(frozen=True)
class _Rotation:
    """What is turned, by which angles; ``doubled``: each angle stands there twice."""

    value: Node
    cos: Node
    sin: Node
    doubled: bool
    interleaved: bool


def _rotated_by_halves(node: Any) -> _Rotation | None:
    """Return the rotation that x·cos + turn(x)·sin is."""
    if not calls(node, aten.add.Tensor):
        return None
    for plain, turned in orders(node):
        for value, cos in factors(plain):
            for other, sin in factors(turned):
                if (interleaved := _is_quarter_turn(other, value)) is not None:
                    return _Rotation(value, cos, sin, doubled=True, interleaved=interleaved)
    return None


def _is_quarter_turn(turned: Any, value: Any) -> bool | None:
    """Return whether pairs are interleaved in (a, b) -> (-b, a) of ``value``; None if it is something else."""
    if calls(turned, aten.cat.default) and _last_axis(turned.args[0][0], turned.args[1:]):
        parts = turned.args[0]
        if len(parts) == 2 and calls(parts[0], aten.neg.default) and _halves(parts[1], parts[0].args[0]) is value:
            return False
    stacked: Any = turned.args[0] if _flattens_last(turned) else None
    if stacked is not None and calls(stacked, aten.stack.default) and _last_axis(stacked, stacked.args[1:]):
        parts = stacked.args[0]
        if len(parts) == 2 and calls(parts[0], aten.neg.default) and _every_second(parts[1], parts[0].args[0]) is value:
            return True
    return None


def _rotated_in_parts(node: Any) -> _Rotation | None:
    """Return the rotation that [a·cos - b·sin, b·cos + a·sin] is, laid behind or between each other."""
    interleaved = _flattens_last(node)
    joined = node.args[0] if interleaved else node
    if not calls(joined, aten.stack.default if interleaved else aten.cat.default) or not _last_axis(joined, joined.args[1:]):
        return None
    parts = joined.args[0]
    if len(parts) != 2 or not calls(parts[0], aten.sub.Tensor) or not calls(parts[1], aten.add.Tensor):
        return None
    for first, cos in factors(parts[0].args[0]):
        for second, sin in factors(parts[0].args[1]):
            value = _every_second(first, second) if interleaved else _halves(first, second)
            crossed = any(
                {first, sin} == set(one.args) and {second, cos} == set(other.args)
                for one, other in orders(parts[1])
                if calls(one, aten.mul.Tensor) and calls(other, aten.mul.Tensor)
            )
            if value is not None and crossed:
                return _Rotation(value, cos, sin, doubled=False, interleaved=interleaved)
    return None


def _last_axis(node: Any, rest: tuple[Any, ...]) -> bool:
    """Return whether the axis that stands in an operator's remaining arguments is the last of ``node``."""
    return bool(rest) and rest[0] in (-1, node.meta["val"].dim() - 1)


def _flattens_last(node: Any) -> bool:
    """Return whether the node lays the last two axes into one."""
    if calls(node, aten.flatten.using_ints):
        return tuple(node.args[1:]) in ((-2, -1), (-2,))
    if not (calls(node, aten.reshape.default) or calls(node, aten.view.default)):
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(before) == len(after) + 1 and before[-1] == 2 and tuple(before[:-2]) == tuple(after[:-1])


def _halves(first: Any, second: Any) -> Any:
    """Return the tensor whose last axis the two halve; None if they do not."""
    if calls(first, aten.slice.Tensor) and calls(second, aten.slice.Tensor):
        value, size = first.args[0], first.args[0].meta["val"].shape[-1]
        last = value.meta["val"].dim() - 1
        if second.args[0] is not value or {first.args[1], second.args[1]} - {-1, last} or len(first.args) > 4 or len(second.args) > 4:
            return None
        return value if tuple(first.args[2:4]) == (0, size // 2) and second.args[2] == size // 2 and second.args[3] >= size else None
    parts = [part.args for part in (first, second) if getattr(part, "target", None) is getitem]
    if len(parts) == 2 and parts[0][0] is parts[1][0] and [part[1] for part in parts] == [0, 1]:
        chunk = parts[0][0]
        halved = calls(chunk, aten.chunk.default) and chunk.args[1] == 2
        if halved and _last_axis(chunk.args[0], chunk.args[2:]):
            return chunk.args[0]
    return None


def _every_second(first: Any, second: Any) -> Any:
    """Return the tensor whose even elements ``first`` is, and whose odd ones ``second``; None if they are not."""
    if not calls(first, aten.slice.Tensor) or not calls(second, aten.slice.Tensor) or first.args[0] is not second.args[0]:
        return None
    value = first.args[0]
    axes = {first.args[1], second.args[1]} - {-1, value.meta["val"].dim() - 1}
    steps = [part.args[4:5] for part in (first, second)]
    return value if not axes and steps == [(2,), (2,)] and (first.args[2], second.args[2]) == (0, 1) else None


def _whole(value: Any, last: Any, turned: int) -> tuple[Node, Node]:
    """Return what is turned and the last node of it, with the part beside it that passes unturned, where there is one."""
    joined = only_user(last)
    if joined is None or not calls(joined, aten.cat.default) or not _last_axis(last, joined.args[1:]):
        return value, last
    parts: Any = joined.args[0]
    passed: Any = parts[1] if len(parts) == 2 and parts[0] is last else None
    if not calls(passed, aten.slice.Tensor) or passed.args[2] != turned:
        return value, last
    source: Any = passed.args[0]
    # A part of the rest alone would not make the head whole again.
    if joined.meta["val"].shape[-1] != source.meta["val"].shape[-1]:
        return value, last
    # Where a whole head is turned, nothing was cut off, and nothing is laid beside it.
    cut = calls(value, aten.slice.Tensor) and value.args[0] is source and tuple(value.args[2:4]) == (0, turned)
    return (source, joined) if cut or source is value else (value, last)


@dataclass
class _Angles:
    """Cosines and sines [B, S, R/2] made once each from what the model multiplies with."""

    model: TracedModel
    made: dict[tuple[Node, bool], Node | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def of(self, factor: Node, axis: int, doubled: bool, interleaved: bool) -> Node | None:
        """Return the angles of which ``factor``, with 1 for the heads, is made; None if they are laid out in another way."""
        name = factor.name
        if doubled and interleaved and _is_twice(factor):
            factor, doubled = factor.args[0], False  # type: ignore[assignment]
            if (whole := _first_half_of(factor)) is not None:
                factor, doubled, interleaved = whole, True, False
        angles = factor.args[0] if calls(factor, aten.unsqueeze.default) and factor.args[1] == axis else None
        # One row for all of a batch is no row for each, which the operator wants.
        if not isinstance(angles, Node) or angles.meta["val"].dim() != 3 or isinstance(angles.meta["val"].shape[0], int):
            self.skipped[name] = "the angles are not one row per batch and position"
            return None
        if not doubled:
            return angles
        if (angles, interleaved) not in self.made:
            self.made[angles, interleaved] = found = self._halved(angles, interleaved)
            if found is None:
                self.skipped[angles.name] = "the angles are laid out in a way of their own"
        return self.made[angles, interleaved]

    def _halved(self, angles: Any, interleaved: bool) -> Node | None:
        if calls(angles, aten.where.self) and angles.args[0].meta["val"].shape[-1] == 1:
            return self._chosen(angles, interleaved)
        if (found := wave(angles)) is None:
            return None
        function, doubled, scale = found
        turns = _doubled(doubled, interleaved)
        if turns is None:
            return None
        with self.model.graph.inserting_after(angles):
            half = call(self.model.graph, function, turns)
        if scale == 1.0:
            return half
        with self.model.graph.inserting_after(half):
            return call(self.model.graph, aten.mul.Tensor, half, scale)

    def _chosen(self, angles: Any, interleaved: bool) -> Node | None:
        """Return half of angles of which a row takes one of two, by its length."""
        condition, *both = angles.args
        halves = [self._halved(one, interleaved) for one in both]
        if None in halves:
            return None
        with self.model.graph.inserting_after(angles):
            return call(self.model.graph, aten.where.self, condition, *halves)


def _doubled(value: Any, interleaved: bool) -> Any:
    """Return f where ``value`` is cat([f, f]), or f with each element twice if ``interleaved``; else None."""
    if interleaved:
        return value.args[0] if _is_twice(value) else None
    parts: Any = value.args[0] if calls(value, aten.cat.default) and _last_axis(value, value.args[1:]) else ()
    return parts[0] if len(parts) == 2 and parts[0] is parts[1] else None


def _is_twice(value: Any) -> bool:
    """Return whether a value has each element of the last axis twice, one after the other."""
    last = value.meta["val"].dim() - 1
    return calls(value, aten.repeat_interleave.self_int) and tuple(value.args[1:]) in ((2, -1), (2, last))


def _first_half_of(value: Any) -> Any:
    """Return what a value is the first half of the last axis of; None if it is not."""
    if not calls(value, aten.slice.Tensor) or len(value.args) > 4:
        return None
    whole = value.args[0]
    size = whole.meta["val"].shape[-1]
    return whole if _last_axis(whole, value.args[1:]) and tuple(value.args[2:4]) == (0, size // 2) else None


def _heads_behind(factor: Any) -> bool:
    """Return whether angles are for [B, S, H, D], 1 standing for the heads."""
    if not isinstance(factor, Node) or factor.meta["val"].dim() != 4:
        return False
    heads = factor.meta["val"].shape[2]
    return isinstance(heads, int) and heads == 1
