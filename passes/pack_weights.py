"""Joins integers with the product or lookup that reads them, their bits packed into bytes as ONNX Runtime's operators want them.

::

    before  linear(%x, calque.dequantize_weight(%q, %scale, %zero_point, bits, 1, group), %b)
            embedding(calque.dequantize_weight(%q, …), %ids)
    after   calque.packed_linear(%x, %packed, %scale, %zero_points, %b, bits, group, in)       packed = Derived(pack, q)
            calque.packed_embedding(%ids, %packed, %scale, %zero_points, bits, group, in)
    left    integers that something else reads

A scale for a whole row becomes one for each group of it, the longest up to 256 that divides it: the operators know no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from calque.packing import pack, pack_zero_points
from calque.passes import Rewrites
from calque.patterns import aten
from calque.traced import call, user_nodes
from calque.weights import Derived, torch_dtype_name

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque
# Source: MatMulNBits of onnxruntime@1.31 takes blocks of 16 to 256.
LONGEST_GROUP = 256


@dataclass(frozen=True)
class PackWeights:
    """Every product with integers, and every lookup in a table of them, is one operator that reads packed bytes."""

    after: ClassVar[frozenset[str]] = frozenset({"quantize_weights"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per product and lookup."""
        packing, count, skipped = _Packing(model), 0, []
        for node in user_nodes(model.graph.nodes, calque.dequantize_weight.default):
            if odd := next((user for user in node.users if not _reads(user, node)), None):
                skipped.append((node.name, f"{odd.target} reads it, which has no form that takes integers"))
                continue
            for user in list(node.users):
                packing.join(user, node)
                count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _reads(user: Node, weight: Node) -> bool:
    """Return whether a node is a product with the weight, or a lookup in it."""
    if user.target is aten.embedding.default:
        return user.args[0] is weight
    return user.target is aten.linear.default and user.args[1] is weight and user.args[0] is not weight


@dataclass
class _Packing:
    """The parameters that were packed so far, by those that they hold."""

    model: TracedModel
    made: dict[Node, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {node: name for name, node in self.model.parameters().items()}

    def join(self, user: Node, weight: Node) -> None:
        """Let one operator do what the node and the weight it reads do."""
        arguments: Any = weight.args
        q, scale, zero_point, bits, _, group = arguments
        size = int(q.meta["val"].shape[1])
        block = group or min(size & -size, LONGEST_GROUP)
        packed = self._packed(q, partial(pack, bits=bits, group=block), _shape(q, size // block, block * bits // 8))
        if not group:
            scale, zero_point = (self._repeated(part, size // block) for part in (scale, zero_point))
        if zero_point is not None:
            shape = _shape(q, (size // block * bits + 7) // 8)
            zero_point = self._packed(zero_point, partial(pack_zero_points, bits=bits), shape)
        with self.model.graph.inserting_before(user):
            given: Any = user.args
            if user.target is aten.embedding.default:
                made = call(self.model.graph, calque.packed_embedding.default, given[1], packed, scale, zero_point, bits, block, size)
            else:
                bias = given[2] if len(given) > 2 else None
                made = call(self.model.graph, calque.packed_linear.default, given[0], packed, scale, zero_point, bias, bits, block, size)
        made.meta = {**user.meta, "val": made.meta["val"]}
        user.replace_all_uses_with(made)
        self.model.graph.erase_node(user)

    def _packed(self, node: Node, function: Any, shape: tuple[int, ...]) -> Node:
        """Return the parameter that holds what ``function`` makes of that of ``node``."""
        if node not in self.made:
            weight = self.model.weights[self.names[node]]
            made = Derived((weight,), "pack", function, "uint8", shape, moved=False, acts="each row")
            self.made[node] = self.model.add_parameter(f"{self.names[node]}.packed", made, like=node)
        return self.made[node]

    def _repeated(self, node: Node | None, count: int) -> Node | None:
        """Return the parameter with its one column ``count`` times."""
        if node is None or count == 1:
            return node
        if node not in self.made:
            weight = self.model.weights[self.names[node]]
            made = Derived(
                (weight,), f"repeat{count}", lambda one: one.repeat(1, count), torch_dtype_name(weight), (weight.shape[0], count),
                acts="each row",
            )  # fmt: skip
            self.made[node] = self.model.add_parameter(f"{self.names[node]}.repeated", made, like=node)
            self.names[self.made[node]] = f"{self.names[node]}.repeated"
        return self.made[node]


def _shape(q: Node, *sizes: int) -> tuple[int, ...]:
    """Return a shape with the rows of the integers and those sizes."""
    return (int(q.meta["val"].shape[0]), *sizes)
