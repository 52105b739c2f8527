"""Makes one product of the three that give an attention its queries, keys and values.

::

    before  calque.grouped_attention(linear(%x, %wq, %bq), linear(%x, %wk, %bk), linear(%x, %wv, %bv), …)
    or      calque.grouped_attention(%y[:, :, :n], %y[:, :, n:m], %y[:, :, m:], …)       or what split(%y) gives
    after   calque.grouped_attention(linear(%x, %w, %b) or %y, None, None, …)      w = Derived(stack, wq, wk, wv)
    left    queries or keys that are normed or turned before they get there; weights that something else reads too

The operator takes the three beside each other as they come out, so nothing is cut apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from calque.passes import Rewrites
from calque.patterns import aten, calls
from calque.traced import call, user_nodes
from calque.weights import Derived, Weight, torch_dtype_name

if TYPE_CHECKING:
    from torch.fx import Node

    from calque.traced import TracedModel


@dataclass(frozen=True)
class MergeQkv:
    """Queries, keys and values of an attention come out of one product."""

    after: ClassVar[frozenset[str]] = frozenset({"fuse_grouped_attention"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per attention."""
        count, skipped = 0, []
        names = {node: name for name, node in model.parameters().items()}
        for attention in user_nodes(model.graph.nodes, torch.ops.calque.grouped_attention.default):
            if attention.args[1] is None:
                continue
            if (whole := _cut_from(attention.args[:3])) is not None:
                attention.args = (whole, None, None, *attention.args[3:])
                count += 1
                continue
            found = _projections(attention.args[:3], names, model)
            if isinstance(found, str):
                skipped.append((attention.name, found))
                continue
            value, weights, biases = found
            with model.graph.inserting_before(attention):
                stacked = [_stack(model, names, nodes) for nodes in (weights, biases) if nodes]
                merged = call(model.graph, aten.linear.default, value, *stacked)
            attention.args = (merged, None, None, *attention.args[3:])
            count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _cut_from(parts: Sequence[Any]) -> Node | None:
    """Return the value that the three parts are cut from one after the other, to its end."""
    pieces = [_piece(part) for part in parts]
    value, end = pieces[0][0], 0
    for part, (source, start) in zip(parts, pieces, strict=True):
        if source is None or source is not value or start != end:
            return None
        end += int(part.meta["val"].shape[2])
    return value if value is not None and end == value.meta["val"].shape[2] else None


def _piece(part: Any) -> tuple[Node | None, int]:
    """Return what a part of the last axis of [B, S, D] is cut from, and where it starts."""
    if calls(part, aten.slice.Tensor) and part.args[1] in (2, -1) and len(part.args) == 4:
        return part.args[0], part.args[2]
    whole: Any = part.args[0] if calls(part, getitem) else None
    if not calls(whole, aten.split.Tensor) and not calls(whole, aten.split_with_sizes.default):
        return None, 0
    if whole.args[2:] not in ((2,), (-1,)):
        return None, 0
    return whole.args[0], sum(int(piece.shape[2]) for piece in whole.meta["val"][: part.args[1]])


def _projections(parts: Sequence[Any], names: dict[Node, str], model: TracedModel) -> tuple[Node, list[Node], list[Node]] | str:
    """Return what all three project, their weights and their biases; or why they cannot be one."""
    if not all(calls(part, aten.linear.default) and len(part.users) == 1 for part in parts):
        return "its queries, keys and values are not three products as they come out"
    if len({part.args[0] for part in parts}) > 1:
        return "its queries, keys and values are products of different values"
    weights = [part.args[1] for part in parts]
    biases = [part.args[2] for part in parts if len(part.args) > 2 and part.args[2] is not None]
    if len(biases) not in (0, 3):
        return "some of its products have a bias, and some have none"
    if any(node not in names or len(node.users) > 1 or model.weights.tied(names[node]) for node in (*weights, *biases)):
        return "its weights are tied, or read by other operators too"
    return parts[0].args[0], weights, biases


def _stack(model: TracedModel, names: dict[Node, str], parameters: Sequence[Node]) -> Node:
    """Return a parameter that holds those given one after the other."""
    weights: list[Weight] = [model.weights[names[node]] for node in parameters]
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    merged = Derived(tuple(weights), "stack", lambda *tensors: torch.cat(tensors), torch_dtype_name(weights[0]), shape)
    return model.add_parameter(f"{names[parameters[0]]}.qkv", merged, like=parameters[0])
