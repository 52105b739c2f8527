"""Joins integers with the product or lookup that reads them, their bits packed into bytes as ONNX Runtime's operators want them.

::

    before  linear(%x, calque.dequantize_weight(%q, %scale, %zero_point, bits, 1, group), %b)
            embedding(calque.dequantize_weight(%q, …), %ids)
    after   calque.packed_linear(%x, %packed, %scale, %zero_points, %b, bits, group, in)       packed = Derived(pack, q)
            calque.packed_embedding(%ids, %packed, %scale, %zero_points, bits, group, in)
    left    integers that something else reads; rows that no group of 16 or more divides

A scale for a whole row becomes one for each group of it, the longest up to 256 that divides it: the operators know no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from calque.packing import pack, pack_zero_points, zero_point_bytes
from calque.passes import Rewrites
from calque.patterns import aten
from calque.products import block_of, reads_rows
from calque.quantization import SHORTEST_GROUP
from calque.traced import call, user_nodes
from calque.weights import Derived

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque


@dataclass(frozen=True)
class PackWeights:
    """Every product with integers, and every lookup in a table of them, is one operator that reads packed bytes."""

    after: ClassVar[frozenset[str]] = frozenset({"quantize_weights"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per product and lookup."""
        packing, count, skipped = _Packing(model), 0, []
        for node in user_nodes(model.graph.nodes, calque.dequantize_weight.default):
            if odd := next((user for user in node.users if not reads_rows(user, node)), None):
                skipped.append((node.name, f"{odd.target} reads it, which has no form that takes integers"))
                continue
            if node.args[0].meta["val"].dtype != torch.int8:  # type: ignore[union-attr]
                skipped.append((node.name, "it is stored as fp8, which has no operator that takes packed bytes"))
                continue
            if block_of(node) < SHORTEST_GROUP:
                skipped.append((node.name, f"its rows divide into no group of {SHORTEST_GROUP} or more"))
                continue
            for user in list(node.users):
                packing.join(user, node)
                count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


@dataclass
class _Packing:
    """The parameters that were packed so far, by those that they hold."""

    model: TracedModel
    made: dict[tuple[Node, str], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {node: name for name, node in self.model.parameters().items()}

    def join(self, user: Node, weight: Node) -> None:
        """Let one operator do what the node and the weight it reads do."""
        arguments: Any = weight.args
        q, scale, zero_point, bits, _, group = arguments
        size, looks_up = int(q.meta["val"].shape[1]), user.target is aten.embedding.default
        block = block_of(weight)
        groups = size // block
        packed = self._made(q, "packed", partial(pack, bits=bits, group=block), "uint8", groups, block * bits // 8)
        if not group and groups > 1:
            repeat = partial(torch.Tensor.repeat, repeats=(1, groups))
            scale = self._made(scale, "repeated", repeat, "float32", groups)
            zero_point = zero_point and self._made(zero_point, "repeated", repeat, "int8", groups)
        if zero_point and looks_up:
            zero_point = self._made(zero_point, "bytes", partial(zero_point_bytes, bits=bits), "uint8", groups)
        elif zero_point:
            zero_point = self._made(zero_point, "packed", partial(pack_zero_points, bits=bits), "uint8", (groups * bits + 7) // 8)
        with self.model.graph.inserting_before(user):
            given: Any = user.args
            if looks_up:
                made = call(self.model.graph, calque.packed_embedding.default, given[1], packed, scale, zero_point, bits, block, size)
            else:
                bias = given[2] if len(given) > 2 else None
                made = call(self.model.graph, calque.packed_linear.default, given[0], packed, scale, zero_point, bias, bits, block, size)
        made.meta = {**user.meta, "val": made.meta["val"]}
        user.replace_all_uses_with(made)
        self.model.graph.erase_node(user)

    def _made(self, node: Node, ending: str, function: Callable[[Tensor], Tensor], dtype: str, *sizes: int) -> Node:
        """Return the parameter, [out, *sizes], that holds what ``function`` makes of that of ``node``."""
        if (node, ending) not in self.made:
            weight, name = self.model.weights[self.names[node]], f"{self.names[node]}.{ending}"
            made = Derived((weight,), ending, function, dtype, (weight.shape[0], *sizes), moved=False, acts="each row")
            self.made[node, ending] = self.model.add_parameter(name, made, like=node)
            self.names[self.made[node, ending]] = name
        return self.made[node, ending]
