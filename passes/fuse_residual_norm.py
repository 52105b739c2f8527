"""Joins the sum of a residual stream with the norm that follows it; both the sum and its norm go on.

::

    before  %s = add(%x, %y)                      read by the norm and by a later sum
            %n = calque.rms_norm(%s, %w, eps)     or aten.layer_norm(%s, [D], %w, %b, eps)
    after   %n, %s = calque.add_rms_norm(%x, %y, %w, eps)    or calque.add_layer_norm(%x, %y, %w, %b, eps)
    left    sums that broadcast, norms without a weight, weights that are computed from more than parameters
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from calque.passes import Rewrites
from calque.patterns import aten, calls
from calque.traced import call

if TYPE_CHECKING:
    from calque.traced import TracedModel


@dataclass(frozen=True)
class FuseResidualNorm:
    """Every norm of a sum of two equally shaped tensors is one operator with that sum."""

    after: ClassVar[frozenset[str]] = frozenset({"fuse_rms_norm"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per norm."""
        count, skipped = 0, []
        for norm in list(model.graph.nodes):
            found = _weights(norm)
            if found is None or not _is_plain_sum(norm.args[0]):
                continue
            fused, parameters = found
            total = norm.args[0]
            made = [part for part in parameters if getattr(part, "op", "") == "call_function"]
            if any(source.op != "placeholder" for part in made for source in part.all_input_nodes):
                skipped.append((norm.name, "its weight is computed from more than parameters"))
                continue
            # Such as w + 1, which stands between the sum and its norm.
            for part in made:
                total.prepend(part)
            with model.graph.inserting_before(total):
                both = call(model.graph, fused, *total.args, *parameters)
                normed, summed = call(model.graph, getitem, both, 0), call(model.graph, getitem, both, 1)
            norm.replace_all_uses_with(normed)
            total.replace_all_uses_with(summed)
            model.graph.erase_node(norm)
            model.graph.erase_node(total)
            count += 1
        return Rewrites(count, tuple(skipped))


def _weights(norm: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Return the operator that a norm with weights joins, and what it takes besides the sum."""
    if calls(norm, torch.ops.calque.rms_norm.default) and norm.args[1] is not None:
        return torch.ops.calque.add_rms_norm.default, norm.args[1:]
    if calls(norm, aten.layer_norm.default) and len(norm.args) > 2 and norm.args[2] is not None and len(norm.args[1]) == 1:
        bias = norm.args[3] if len(norm.args) > 3 else None
        epsilon = norm.args[4] if len(norm.args) > 4 else 1e-5
        return torch.ops.calque.add_layer_norm.default, (norm.args[2], bias, epsilon)
    return None


def _is_plain_sum(value: Any) -> bool:
    """Return whether a value is the sum of two computed tensors [B, S, D] of its own shape."""
    if not calls(value, aten.add.Tensor) or value.kwargs or value.meta["val"].dim() != 3:
        return False
    shape = tuple(value.meta["val"].shape)
    # A bias is a parameter, whose sum is no residual.
    parts = [part.meta.get("val") for part in value.args if getattr(part, "op", "") == "call_function"]
    return [tuple(part.shape) for part in parts if isinstance(part, torch.Tensor)] == [shape, shape]
