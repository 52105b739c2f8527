"""Makes one product of the two of a gated feed-forward layer, and cuts it in two.

::

    before  mul(silu(linear(%x, %wg, %bg)), linear(%x, %wu, %bu))            or gelu, quick_gelu, relu, sigmoid; either way round
    after   %gate, %up = split(linear(%x, %w, %b))                          w = Derived(stack, wg, wu)
            mul(silu(%gate), %up)
    left    gates of another value than what they gate; weights that something else reads too

No target has it in its list: in fp32 cutting costs what one product less saves (docs/design/0006-fused-operators.md). It is for
recipes, and for products that cost more to begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from calque.passes import Rewrites
from calque.passes.merge_qkv import cut, merged, projections
from calque.patterns import aten, calls, only_user, orders
from calque.traced import user_nodes

if TYPE_CHECKING:
    from torch.fx import Node

    from calque.traced import TracedModel

ACTIVATIONS = {
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, torch.ops.calque.quick_gelu.default,
}  # fmt: skip


@dataclass(frozen=True)
class MergeGateUp:
    """Gate and values of a gated feed-forward layer come out of one product."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per layer."""
        count, skipped = 0, []
        names = {node: name for name, node in model.parameters().items()}
        for product in user_nodes(model.graph.nodes, aten.mul.Tensor):
            parts = _gate_and_up(product)
            if parts is None:
                continue
            found = projections(parts, "gate and values", names, model)
            if isinstance(found, str):
                skipped.append((product.name, found))
                continue
            # Before both: what reads one of them may stand before the other.
            first = min(parts, key=list(model.graph.nodes).index)
            with model.graph.inserting_before(first):
                pieces = cut(model.graph, merged(model, names, found, "gate_up"), [int(part.meta["val"].shape[-1]) for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.replace_all_uses_with(piece)
            count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _gate_and_up(product: Any) -> tuple[Node, Node] | None:
    """Return the product under an activation and the one beside it; None where a value is gated by something else."""
    for gate, up in orders(product):
        if getattr(gate, "target", None) not in ACTIVATIONS or only_user(gate) is not product:
            continue
        inner = gate.args[0]
        if calls(inner, aten.linear.default) and calls(up, aten.linear.default) and inner is not up:
            return inner, up
    return None
