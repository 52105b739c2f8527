"""Makes one product of the three that give an attention its queries, keys and values.

::

    before  calque.grouped_attention(linear(%x, %wq, %bq), linear(%x, %wk, %bk), linear(%x, %wv, %bv), …)
    or      calque.grouped_attention(%y[:, :, :n], %y[:, :, n:m], %y[:, :, m:], …)       or what split(%y) gives
    after   calque.grouped_attention(linear(%x, %w, %b) or %y, None, None, …)      w = Derived(stack, wq, wk, wv)
    or      where queries and keys are normed or turned on the way, both in one:
            %both, %v = split(linear(%x, %w, %b))
            %q, %k = split(calque.flat_rotary(calque.flat_rms_norm(%both, …), …))
            calque.grouped_attention(%q, %k, %v, …)
            of weights that are integers, those, their scales and zero points are stacked each for themselves
    left    queries that are normed or turned in another way than keys; weights that something else reads too

The operator takes the three beside each other as they come out, so nothing is cut apart again unless it was changed on the way.
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


COUNTS = {2: "two", 3: "three"}
flat_rotary = torch.ops.calque.flat_rotary.default
flat_rms_norm = torch.ops.calque.flat_rms_norm.default
dequantize_weight = torch.ops.calque.dequantize_weight.default


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
            steps, parts = _steps(attention.args[:3], names)
            whole = _cut_from(parts)
            found = projections(parts, "queries, keys and values", names, model) if whole is None else None
            if isinstance(found, str):
                skipped.append((attention.name, found))
                continue
            with model.graph.inserting_before(attention):
                if found is not None:
                    whole = merged(model, names, found, "qkv")
                new = _cut(model, names, whole, parts, steps) if steps else (whole, None, None)
            attention.args = (*new, *attention.args[3:])
            count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _steps(parts: Sequence[Any], names: dict[Node, str]) -> tuple[list[tuple[Node, Node]], list[Any]]:
    """Return what is done to queries and keys alike, first to last, and what it is done to; values as they are."""
    steps: list[tuple[Node, Node]] = []
    query, key, value = parts
    while len(query.users) == len(key.users) == 1 and (_turned_alike(query, key) or _normed_alike(query, key, names)):
        steps.insert(0, (query, key))
        query, key = query.args[0], key.args[0]
    return steps, [query, key, value]


def _turned_alike(query: Any, key: Any) -> bool:
    return calls(query, flat_rotary) and calls(key, flat_rotary) and query.args[1:5] == key.args[1:5]


def _normed_alike(query: Any, key: Any, names: dict[Node, str]) -> bool:
    """Return whether both are normed with a weight that is a parameter, by the same epsilon."""
    both = calls(query, flat_rms_norm) and calls(key, flat_rms_norm)
    return both and query.args[2] == key.args[2] and query.args[1] in names and key.args[1] in names


def _cut(
    model: TracedModel, names: dict[Node, str], whole: Any, parts: Sequence[Any], steps: Sequence[tuple[Node, Node]]
) -> tuple[Node, Node, Node]:
    """Return queries, keys and values cut from the whole, the steps done to queries and keys while they are one."""
    graph, sizes = model.graph, [int(part.meta["val"].shape[2]) for part in parts]
    both, value = cut(graph, whole, [sizes[0] + sizes[1], sizes[2]])
    for query, key in steps:
        heads = (int(query.args[-1]), int(key.args[-1]))  # type: ignore[arg-type]
        if calls(query, flat_rotary):
            both = call(graph, flat_rotary, both, *query.args[1:5], sum(heads))
        else:
            weight = _each_head(model, names, (query.args[1], key.args[1]), heads)
            both = call(graph, flat_rms_norm, both, weight, query.args[2], sum(heads))
    query, key = cut(graph, both, sizes[:2])
    return query, key, value


def cut(graph: torch.fx.Graph, value: Node, sizes: list[int]) -> tuple[Node, Node]:
    """Return the two pieces of those sizes of the last axis of [B, S, D]."""
    pieces = call(graph, aten.split_with_sizes.default, value, sizes, 2)
    return call(graph, getitem, pieces, 0), call(graph, getitem, pieces, 1)


def _each_head(model: TracedModel, names: dict[Node, str], parameters: tuple[Any, Any], heads: tuple[int, int]) -> Node:
    """Return a parameter that holds the weight of every query's head and of every key's."""
    one, other = (model.weights[names[node]] for node in parameters)
    made = Derived(
        (one, other), f"repeat{heads}", lambda *weights: torch.cat([w.repeat(n) for w, n in zip(weights, heads, strict=True)]),
        torch_dtype_name(one), (one.shape[0] * heads[0] + other.shape[0] * heads[1],),
    )  # fmt: skip
    return model.add_parameter(f"{names[parameters[0]]}.heads", made, like=parameters[0])


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


def projections(parts: Sequence[Any], called: str, names: dict[Node, str], model: TracedModel) -> tuple[Node, list[Node], list[Node]] | str:
    """Return what all parts project, their weights and their biases; or why they cannot be one product.

    Weights are parameters, or integers that are made numbers, alike in all parts.
    """
    if not all(calls(part, aten.linear.default) and len(part.users) == 1 for part in parts):
        return f"its {called} are not {COUNTS[len(parts)]} products as they come out"
    if len({part.args[0] for part in parts}) > 1:
        return f"its {called} are products of different values"
    weights = [part.args[1] for part in parts]
    biases = [part.args[2] for part in parts if len(part.args) > 2 and part.args[2] is not None]
    if len(biases) not in (0, len(parts)):
        return "some of its products have a bias, and some have none"
    if len({_stored_alike(weight) for weight in weights}) > 1:
        return "its weights are stored in different ways"
    held = [node for weight in weights for node in (weight, *_integers(weight))]
    if any(len(node.users) > 1 or (node in names and model.weights.tied(names[node])) for node in (*held, *biases)):
        return "its weights are tied, or read by other operators too"
    if any(node not in names for node in (*biases, *(part for weight in weights for part in _integers(weight) or [weight]))):
        return "its weights are computed"
    return parts[0].args[0], weights, biases


def _integers(weight: Any) -> list[Node]:
    """Return the parameters of a weight that is stored as integers: those, their scales, their zero points."""
    return [part for part in weight.args[:3] if part is not None] if calls(weight, dequantize_weight) else []


def _stored_alike(weight: Any) -> tuple[Any, ...]:
    """Return what must be the same of weights that are stacked; nothing of those that are numbers."""
    return (len(_integers(weight)), weight.args[0].meta["val"].dtype, *weight.args[3:]) if calls(weight, dequantize_weight) else ()


def merged(model: TracedModel, names: dict[Node, str], found: tuple[Node, list[Node], list[Node]], ending: str) -> Node:
    """Return one product, at the graph's insertion point, that gives those found one after the other."""
    value, weights, biases = found
    rows = [_integers(weight) or [weight] for weight in weights]
    stacked = [_stack(model, names, nodes, ending) for nodes in zip(*rows, strict=True)]
    if calls(weights[0], dequantize_weight):
        zero_point = stacked[2] if len(stacked) == 3 else None
        stacked = [call(model.graph, dequantize_weight, *stacked[:2], zero_point, *weights[0].args[3:])]
    bias = [_stack(model, names, biases, ending)] if biases else []
    return call(model.graph, aten.linear.default, value, *stacked, *bias)


def _stack(model: TracedModel, names: dict[Node, str], parameters: Sequence[Node], ending: str) -> Node:
    """Return a parameter that holds those given one after the other."""
    weights: list[Weight] = [model.weights[names[node]] for node in parameters]
    shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
    made = Derived(tuple(weights), "stack", lambda *tensors: torch.cat(tensors), torch_dtype_name(weights[0]), shape, acts="stacks")
    return model.add_parameter(f"{names[parameters[0]]}.{ending}", made, like=parameters[0])
