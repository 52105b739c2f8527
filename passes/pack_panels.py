"""Joins integers with the product or lookup that reads them, laid in panels of eight outputs as vectors of a processor read them.

::

    before  linear(%x, calque.dequantize_weight(%q, %scale, %zero_point, bits, 1, group), %b)
            embedding(calque.dequantize_weight(%q, …), %ids)
    after   calque.panel_linear(%x, %panels, %scales, %zero_points, %b, None, bits, block, out)    panels = Derived(lay_in_panels, q)
            calque.panel_lookup(%ids, %panels, %scales, %zero_points)                              the same panels where they are tied
    or      calque.dequantize_weight(calque.out_of_halves(%halves), …)         of 4 bits, where something else reads them (experts)
    left    integers of 8 bits that something else reads; rows that are no multiple of 8

A panel lies in memory as it is multiplied, one byte after the other: a step of decoding reads the weights once, in order. Integers
and scales are those of the pass that made them; what they are is `calque.panel_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from calque.panel_ops import LANES, QUAD, in_halves, lay_in_panels, lay_scales
from calque.passes import Rewrites
from calque.patterns import aten
from calque.products import block_of, reads_rows
from calque.traced import call, user_nodes
from calque.weights import Derived

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque

# Inputs that a step of the kernel reads: two halves of four.
STEP = 2 * QUAD


@dataclass(frozen=True)
class PackPanels:
    """Every product with integers, and every lookup in a table of them, is one operator that reads panels."""

    after: ClassVar[frozenset[str]] = frozenset({"quantize_weights"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per product and lookup."""
        packing, count, skipped = _Packing(model), 0, []
        for node in user_nodes(model.graph.nodes, calque.dequantize_weight.default):
            if why := _unfit(node):
                skipped.append((node.name, why))
                count += packing.halve(node)
                continue
            for user in list(node.users):
                packing.join(user, node)
                count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _unfit(weight: Node) -> str:
    """Return why a weight cannot lie in panels; nothing where it can."""
    if odd := next((user for user in weight.users if not reads_rows(user, weight)), None):
        return f"{odd.target} reads it, which has no form that takes integers"
    q: Any = weight.args[0]
    if q.meta["val"].dtype != torch.int8:
        return "it is stored as fp8, which has no operator that takes panels"
    return f"its rows of {q.meta['val'].shape[1]} are no multiple of {STEP}" if block_of(weight) % STEP else ""


@dataclass
class _Packing:
    """The parameters that were laid so far, by those that they hold."""

    model: TracedModel
    made: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {node: name for name, node in self.model.parameters().items()}

    def join(self, user: Node, weight: Node) -> None:
        """Let one operator do what the node and the weight it reads do."""
        arguments: Any = weight.args
        q, scale, zero_point, bits, _, _ = arguments
        outputs, columns = q.meta["val"].shape
        panels, groups = -(-outputs // LANES), int(scale.meta["val"].shape[1])
        shape = (panels, columns // (QUAD if bits == 8 else STEP), LANES, QUAD)
        parts = [self._laid(q, partial(lay_in_panels, bits=bits), "int8" if bits == 8 else "uint8", shape)]
        for part, dtype in ((scale, "float32"), (zero_point, "int8")):
            parts.append(part and self._laid(part, lay_scales, dtype, (panels, groups, LANES)))
        graph, given = self.model.graph, user.args
        with graph.inserting_before(user):
            if user.target is aten.embedding.default:
                made = call(graph, calque.panel_lookup.default, given[1], *parts)
            else:
                bias = given[2] if len(given) > 2 else None
                made = call(graph, calque.panel_linear.default, given[0], *parts, bias, None, bits, block_of(weight), outputs)
        made.meta = {**user.meta, "val": made.meta["val"]}
        user.replace_all_uses_with(made)
        graph.erase_node(user)

    def halve(self, weight: Node) -> bool:
        """Return whether integers of 4 bits, which have a byte each, were put two in a byte."""
        q: Any = weight.args[0]
        if weight.args[3] != 4 or q not in self.names or q.meta["val"].shape[1] % 2:
            return False
        rows, columns = q.meta["val"].shape
        packed = self._laid(q, in_halves, "uint8", (rows, columns // 2), "halves")
        with self.model.graph.inserting_before(weight):
            apart = call(self.model.graph, calque.out_of_halves.default, packed)
        weight.replace_input_with(q, apart)
        return True

    def _laid(self, node: Node, function: Callable[[Tensor], Tensor], dtype: str, shape: tuple[int, ...], how: str = "panels") -> Node:
        """Return the parameter that holds what ``function`` makes of that of ``node``."""
        if node not in self.made:
            weight, name = self.model.weights[self.names[node]], f"{self.names[node]}.{how}"
            self.made[node] = self.model.add_parameter(name, Derived((weight,), how, function, dtype, shape, moved=False), like=node)
        return self.made[node]
