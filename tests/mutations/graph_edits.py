"""Edits of a traced graph by what a node means, shared by the mutations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.fx import Node

from calque.traced import TracedModel, user_nodes

aten = torch.ops.aten


def node_of(value: Any) -> Node:
    """The argument, which is a node."""
    assert isinstance(value, Node), value
    return value


def attentions(model: TracedModel) -> list[Node]:
    """The attention of each layer, in order."""
    return user_nodes(list(model.graph.nodes), torch.ops.calque.attention.default)


def masks(model: TracedModel) -> list[Node]:
    """The mask of each kind of layer."""
    return user_nodes(list(model.graph.nodes), torch.ops.calque.attention_mask.default)


def caches(model: TracedModel, layer: int) -> tuple[Node, Node]:
    """The concatenations of past and new keys, and values, of a layer."""
    _, key, value = attentions(model)[layer].args[:3]
    return node_of(key), node_of(value)


def joined(concatenation: Node) -> tuple[Node, Node]:
    """The two nodes that are joined: for a cache, past and new."""
    first, second = cast("list[Node]", concatenation.args[0])
    return first, second


def above(node: Node, target: Any) -> list[Node]:
    """The nodes of ``target`` that ``node`` is computed from, nearest first."""
    seen, queue = {node}, [node]
    for current in queue:
        fresh = [before for before in current.all_input_nodes if before not in seen]
        seen.update(fresh)
        queue += fresh
    return [found for found in queue if found.target is target]


def below(node: Node) -> list[Node]:
    """The nodes computed from ``node``, in graph order."""
    reached, found = {node}, []
    for current in node.graph.nodes:
        if reached.intersection(current.all_input_nodes):
            reached.add(current)
            found.append(current)
    return found


def replace_by(model: TracedModel, node: Node, function: Callable[..., Any], *arguments: Any) -> Node:
    """Every reader of ``node`` reads ``function(*arguments)``; ``node`` itself may be among the arguments."""
    placeholders = [other for other in model.graph.nodes if other.op == "placeholder"]
    with model.graph.inserting_after(placeholders[-1] if node.op == "placeholder" else node):
        made = model.graph.call_function(function, arguments)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def feed(model: TracedModel, reader: Node, index: int, function: Callable[..., Any], *arguments: Any) -> None:
    """The reader's argument at ``index`` becomes ``function(that, *arguments)``; nobody else sees it."""
    with model.graph.inserting_before(reader):
        made = model.graph.call_function(function, (reader.args[index], *arguments))
    reader.args = (*reader.args[:index], made, *reader.args[index + 1 :])


def rebuilt(model: TracedModel, node: Node, before: Node, changed: Mapping[Node, Node]) -> Node:
    """A second ``node``, computed from ``changed``'s values instead of its keys; put ahead of ``before``."""
    known = dict(changed)
    for current in list(model.graph.nodes):
        if current is before:
            break
        if current not in known and any(argument in known for argument in current.all_input_nodes):
            with model.graph.inserting_before(before):
                known[current] = model.graph.node_copy(current, lambda argument: known.get(argument, argument))
    return known[node]


def outputs(model: TracedModel) -> dict[str, Node]:
    """What the graph returns, by name."""
    returned = model.output_node().args[0]
    return {spec.name: node_of(node) for spec, node in zip(model.outputs, returned, strict=True)}  # type: ignore[arg-type]


def return_instead(model: TracedModel, changed: Mapping[str, Node]) -> None:
    """The graph returns ``changed`` under those names, and the rest as before."""
    model.output_node().args = (tuple({**outputs(model), **changed}.values()),)


def computed(model: TracedModel, function: Callable[..., Any], *arguments: Any) -> Node:
    """A new node ahead of the output."""
    with model.graph.inserting_before(model.output_node()):
        return model.graph.call_function(function, arguments)
