"""Writes complex arithmetic in real numbers: runtimes have no complex tensors, and rotary embeddings need none.

::

    before  c = polar(length, angle)                 x = view_as_complex(pairs)    y = view_as_real(x * c)
    after   c = stack(length·cos, length·sin), last  x = pairs                     y = stack(re·re − im·im, re·im + im·re)

A complex tensor [...] is a real one [..., 2]. Source: Llama 4 and DeepSeek-V2 turn queries and keys this way,
transformers/models/llama4/modeling_llama4.py apply_rotary_emb @5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from calque.traced import TracedModel

aten = torch.ops.aten

Call = Callable[..., Node]


def write_in_real_numbers(model: TracedModel) -> int:
    """Return how many complex operators were rewritten; the graph is left as it was where one of them is unknown."""
    complex_nodes = [node for node in model.graph.nodes if _is_complex(node)]
    if not complex_nodes or not all(node.target in _PAIRS for node in complex_nodes):
        return 0
    readers = {user: None for node in complex_nodes for user in node.users if not _is_complex(user)}
    if not all(reader.target in _READERS for reader in readers):
        return 0
    pairs: dict[Node, Node] = {}
    for node in complex_nodes:
        with model.graph.inserting_before(node):
            pairs[node] = _PAIRS[node.target](_caller(model.graph, node), node, pairs)
    for reader in readers:
        with model.graph.inserting_before(reader):
            real = _READERS[reader.target](_caller(model.graph, reader), pairs[reader.args[0]])
        reader.replace_all_uses_with(real)
        model.graph.erase_node(reader)
    for node in reversed(complex_nodes):
        model.graph.erase_node(node)
    model.finish_rewrite()
    return len(complex_nodes)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_complex()


def _caller(graph: Graph, like: Node) -> Call:
    """Return what adds a node with its value, at the graph's insertion point, in the name of ``like``."""

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
        values = torch.fx.node.map_arg(args, lambda argument: argument.meta["val"])
        with like.meta["val"].fake_mode:
            node.meta["val"] = target(*values)
        return node

    return call


def _parts(call: Call, pair: Node) -> tuple[Node, Node]:
    return call(aten.select.int, pair, -1, 0), call(aten.select.int, pair, -1, 1)


def _polar(call: Call, node: Node, _: dict[Node, Node]) -> Node:
    length, angle = node.args
    parts = [call(aten.mul.Tensor, length, call(turn, angle)) for turn in (aten.cos.default, aten.sin.default)]
    return call(aten.stack.default, parts, -1)


def _made_of_parts(call: Call, node: Node, _: dict[Node, Node]) -> Node:
    return call(aten.stack.default, list(node.args), -1)


def _product(call: Call, node: Node, pairs: dict[Node, Node]) -> Node:
    one, other = node.args
    if one not in pairs:
        one, other = other, one
    if not isinstance(other, Node):
        return call(aten.mul.Tensor, pairs[one], other)  # type: ignore[index]
    if other not in pairs:
        return call(aten.mul.Tensor, pairs[one], call(aten.unsqueeze.default, other, -1))  # type: ignore[index]
    (a, b), (c, d) = _parts(call, pairs[one]), _parts(call, pairs[other])  # type: ignore[index]
    times = aten.mul.Tensor
    real = call(aten.sub.Tensor, call(times, a, c), call(times, b, d))
    imaginary = call(aten.add.Tensor, call(times, a, d), call(times, b, c))
    return call(aten.stack.default, [real, imaginary], -1)


def _same_axis(call: Call, node: Node, pairs: dict[Node, Node]) -> Node:
    """Return the operator on the pair: an axis counted from the end is one further from it."""
    value, axis, *rest = node.args
    counted = axis - 1 if isinstance(axis, int) and axis < 0 else axis
    return call(node.target, pairs[value], counted, *rest)  # type: ignore[index]


_PAIRS: dict[Any, Callable[[Call, Node, dict[Node, Node]], Node]] = {
    aten.polar.default: _polar,
    aten.complex.default: _made_of_parts,
    aten.view_as_complex.default: lambda call, node, pairs: node.args[0],  # type: ignore[dict-item, return-value]
    aten.mul.Tensor: _product,
    aten.unsqueeze.default: _same_axis,
    aten.slice.Tensor: _same_axis,
}
_READERS: dict[Any, Callable[[Call, Node], Node]] = {
    aten.view_as_real.default: lambda call, pair: pair,
    aten.real.default: lambda call, pair: _parts(call, pair)[0],
    aten.imag.default: lambda call, pair: _parts(call, pair)[1],
}
