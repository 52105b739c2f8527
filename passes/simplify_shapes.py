"""Takes away what only arranges a value in another shape and back, and arithmetic on lengths that no operator needs.

::

    before  reshape(addmm(%b, reshape(%x [B, S, K], [-1, K]), %w [K, N]), [B, S, N])    transformers' Conv1D
    after   add(matmul(%x, %w), %b)
    before  reshape(%x, its own shape)
    after   %x
    before  reshape(%x [B, S, H·D], [B, S, H, D])          reshape(%x [B, S, H, D], [B, S, H·D])
    after   calque.split_heads(%x, H)                      calque.join_heads(%x)
    left    every other shape that is computed

The last two take batch and sequence as they are: a target needs no arithmetic for them. Lengths are equal where their symbols are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from calque.passes import Rewrites
from calque.patterns import aten, calls, only_user
from calque.traced import call

if TYPE_CHECKING:
    from torch.fx import Node

    from calque.traced import TracedModel


@dataclass(frozen=True)
class SimplifyShapes:
    """No value is reshaped to be multiplied, or into the shape that it has."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per value that was arranged, and the shapes that are computed still."""
        count, skipped = 0, list[tuple[str, str]]()
        for node in list(model.graph.nodes):
            product = only_user(node) if calls(node, aten.addmm.default) else None
            if product is not None and calls(product, aten.reshape.default) and (value := _flattened(node, product)) is not None:
                bias, _, weight = node.args
                with model.graph.inserting_before(product):
                    multiplied = call(model.graph, aten.matmul.default, value, weight)
                    product.replace_all_uses_with(call(model.graph, aten.add.Tensor, multiplied, bias))
                count += 1
        for node in list(model.graph.nodes):
            if not calls(node, aten.reshape.default) or not node.users:
                continue
            new = _simpler(model, node)
            if new is not None:
                node.replace_all_uses_with(new)
                count += 1
            elif any(getattr(size, "op", "") == "call_function" for size in node.args[1]):
                skipped.append((node.name, "its shape is computed"))
        model.graph.eliminate_dead_code()
        return Rewrites(count, tuple(skipped))


def _flattened(addmm: Node, product: Node) -> Any:
    """Return x where a product is of x with its leading axes as one, and gives these axes back; None otherwise."""
    rows: Any = addmm.args[1]
    if addmm.kwargs or not calls(rows, aten.reshape.default):
        return None
    value, bias = rows.args[0], addmm.args[0]
    before, after = _shape(value), _shape(product)
    whole = len(_shape(rows)) == 2 and _equal(before[-1:], _shape(rows)[-1:]) and _equal(before[:-1], after[:-1])
    one_row = _equal(after[-1:], _shape(addmm)[-1:]) and len(_shape(bias)) == 1
    return value if whole and one_row else None


def _simpler(model: TracedModel, node: Any) -> Node | None:
    """Return what a reshaped value is without arithmetic on its lengths; None where there is nothing simpler."""
    value, before, after = node.args[0], _shape(node.args[0]), _shape(node)
    if _equal(before, after):
        same: Node = value
        return same
    if not _equal(before[:2], after[:2]) or {len(before), len(after)} != {3, 4}:
        return None
    if not any(isinstance(size, torch.SymInt) for size in before):
        return None
    apart, whole = (after, before) if len(after) == 4 else (before, after)
    if any(isinstance(size, torch.SymInt) for size in (*apart[2:], whole[2])) or apart[2] * apart[3] != whole[2]:
        return None
    with model.graph.inserting_before(node):
        if len(after) == 4:
            return call(model.graph, torch.ops.calque.split_heads.default, value, int(after[2]))
        return call(model.graph, torch.ops.calque.join_heads.default, value)


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.meta["val"].shape)


def _equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return whether lengths are the same numbers or the same symbols."""
    return len(one) == len(other) and all(_symbol(left) == _symbol(right) for left, right in zip(one, other, strict=True))


def _symbol(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
