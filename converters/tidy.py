"""Removes from a fresh trace what says nothing: the graph every pass and target sees has no such nodes.

::

    before  slice(x, 0, 0, max)  to(x: float32, float32)  alias(x)  dropout(x, p, False)  contiguous(x)  _assert_*
    after   x

    before  to(x, dtype)  to(x, device, dtype)  type_as(x, y)      a & b on bool
    after   _to_copy(x, dtype=…)                               logical_and(a, b)

    before  x * y in bfloat16
    after   to bfloat16(to float32(x) * to float32(y))         the same bits: that is how a CPU does it

    before  view(x, shape)
    after   reshape(x, shape)

    before  matmul(x, transpose(w, 0, 1))  x @ w.T  mm(x, t(w))      w a parameter [out, in]
    after   linear(x, w)

Shapes and values are those of before; views that differ in strides alone are one to every target.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.fx import Node

from calque.traced import TracedModel

aten = torch.ops.aten

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}
COPIES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.clone.default,
}
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.to.other, aten.type_as.default}
# Falcon rounds its ALiBi to bfloat16, in which the CPU kernels of runtimes do not compute.
ARITHMETIC = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor}
# ``&`` and ``|`` on masks: one spelling, which every target has a word for.
LOGICAL = {
    aten.__and__.Tensor: aten.logical_and.default,
    aten.__or__.Tensor: aten.logical_or.default,
    aten.bitwise_and.Tensor: aten.logical_and.default,
    aten.bitwise_or.Tensor: aten.logical_or.default,
}
# Products that read a weight [in, out]; Falcon's is one that it turns first.
MULTIPLIED = {aten.matmul.default, aten.mm.default}
TURNED = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}


def tidy(model: TracedModel) -> int:
    """Return how many nodes were removed or simplified; the graph computes what it did and changes nothing in place."""
    count = functionalize(model)
    parameters = set(model.parameters().values())
    for node in list(model.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS and not node.users:
            model.graph.erase_node(node)
            count += 1
        elif _says_nothing(node):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
            count += 1
        elif node.target in ARITHMETIC and node.meta["val"].dtype == torch.bfloat16:
            _in_float32(model, node)
            count += 1
        elif node.target in CASTS and node.target is not aten._to_copy.default:
            _as_plain_cast(model, node)
            count += 1
        elif node.target is aten.view.default:
            # A view of what was contiguous before a copy went; reshape is view wherever view was right.
            node.target = aten.reshape.default
        elif node.target in MULTIPLIED and (weight := _turned(node.args[1])) in parameters:
            node.target, node.args = aten.linear.default, (node.args[0], weight)
            count += 1
        elif node.target in LOGICAL and node.meta["val"].dtype == torch.bool:
            node.target = LOGICAL[node.target]
            count += 1
    model.drop_unused_parameters()
    # With them, export would check inputs against the trace's whenever it traces again; passes add, drop and reshape some.
    model.program._example_inputs = None
    model.finish_rewrite()
    return count


def functionalize(model: TracedModel) -> int:
    """Return how many in-place operators were replaced by their functional form.

    A plain ``x.div_(y)`` on a value that nothing views is respelled here. Anything else goes through torch's own
    functionalization, which traces the whole graph once more and so takes as long as the trace did.
    """
    mutating = [node for node in model.graph.nodes if _mutates(node)]
    if not all(_unviewed(node) for node in mutating):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about a class of its own
            model.program = model.program.run_decompositions({})
        return len(mutating)
    order = {node: place for place, node in enumerate(model.graph.nodes)}
    for node in mutating:
        value = node.args[0]
        name = node.target._schema.name.split("::")[1].rstrip("_")
        node.target = getattr(getattr(aten, name), node.target._overloadname)
        value.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    return len(mutating)


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.target not in COPIES


def _unviewed(node: Node) -> bool:
    """Return whether the value changed in place is nobody's view, has no view, and has a functional twin."""
    value, schema = node.args[0], node.target._schema  # type: ignore[union-attr]
    twin = getattr(aten, schema.name.split("::")[1].rstrip("_"), None)
    if twin is None or node.target._overloadname not in twin.overloads() or not isinstance(value, Node):  # type: ignore[union-attr]
        return False
    return not _aliases(value) and not any(_aliases(user) for user in value.users if user is not node)


def _aliases(node: Node) -> bool:
    """Return whether a node's value may share memory with one of its inputs."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "placeholder"
    return any(returned.alias_info is not None for returned in node.target._schema.returns)


def _says_nothing(node: Node) -> bool:
    if node.target in COPIES:
        return True
    if node.target in CASTS:
        return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)  # type: ignore[union-attr]
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target is aten.slice.Tensor:
        start, end, step = [*node.args[2:], None, None, None][:3]
        whole = end is None or (isinstance(end, int) and end >= 2**63 - 1)
        return start in (None, 0) and whole and step in (None, 1)
    if node.target is aten.expand.default:
        sizes = node.args[1]
        return bool(len(sizes) == node.args[0].meta["val"].dim() and all(size == -1 for size in sizes))  # type: ignore[union-attr, arg-type]
    return False


def _turned(value: Any) -> Any:
    """Return the matrix that the argument is with its two axes swapped; None if it is not."""
    if not isinstance(value, Node) or value.op != "call_function" or value.target not in TURNED or value.meta["val"].dim() != 2:
        return None
    given: tuple[Any, ...] = value.args
    axes = given[1:] if value.target is aten.transpose.int else given[1] if value.target is aten.permute.default else (1, 0)
    same = value.target is aten.permute.default and axes[0] % 2 == 0
    return None if same or axes[0] % 2 == axes[1] % 2 else given[0]


def _in_float32(model: TracedModel, node: Node) -> None:
    """Leave the operator computing in float32, its result rounded to bfloat16 as before."""

    def cast(value: Node, dtype: torch.dtype) -> Node:
        plain = model.graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
        plain.meta = {**node.meta, "val": value.meta["val"].to(dtype)}
        return plain

    with model.graph.inserting_before(node):
        wide = [cast(value, torch.float32) if isinstance(value, Node) else value for value in node.args]
        exact = model.graph.call_function(node.target, tuple(wide), node.kwargs)  # type: ignore[arg-type]
        exact.meta = {**node.meta, "val": node.meta["val"].to(torch.float32)}
        rounded = cast(exact, torch.bfloat16)
    node.replace_all_uses_with(rounded)
    model.graph.erase_node(node)


def _as_plain_cast(model: TracedModel, node: Node) -> None:
    """Leave one spelling of a cast: ``_to_copy(x, dtype=…)``."""
    with model.graph.inserting_before(node):
        plain = model.graph.call_function(aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype})
    plain.meta = dict(node.meta)
    node.replace_all_uses_with(plain)
    model.graph.erase_node(node)
