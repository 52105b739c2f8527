"""Lays a linear layer's weight out as matrix products read it: [out, in] becomes [in, out], computed at emission.

::

    before  linear(%x, %w[out, in], %b)
    after   add(matmul(%x, %w_t[in, out]), %b)          w_t = Derived(transpose, w)
    left    weights that are tied or read by anything but linear layers: they are stored once, as they are

A runtime that multiplies by a transposed constant folds a second copy of it when it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.fx import Node

from calque.passes import Rewrites
from calque.weights import transpose

if TYPE_CHECKING:
    from calque.traced import TracedModel

aten = torch.ops.aten


@dataclass(frozen=True)
class TransposeLinear:
    """Every weight that linear layers alone read is stored input-major."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per weight."""
        model.drop_unused_parameters()  # a second name that nothing reads does not make a weight tied
        count, skipped = 0, []
        for name, weight in model.parameters().items():
            users = [user for user in weight.users if user.target is aten.linear.default and user.args[1] is weight]
            if not users:
                continue
            if len(users) != len(weight.users) or model.weights.tied(name):
                skipped.append((name, "tied, or read by other operators too"))
                continue
            transposed = model.add_parameter(f"{name}.transposed", transpose(model.weights[name]), like=weight)
            for user in users:
                _as_matmul(model, user, transposed)
            count += 1
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _as_matmul(model: TracedModel, linear: Node, weight: Node) -> None:
    inputs, bias = linear.args[0], linear.args[2] if len(linear.args) > 2 else None
    with model.graph.inserting_before(linear):
        out = model.graph.call_function(aten.matmul.default, (inputs, weight))
        out.meta = dict(linear.meta)
        if bias is not None:
            out = model.graph.call_function(aten.add.Tensor, (out, bias))
            out.meta = dict(linear.meta)
    linear.replace_all_uses_with(out)
    model.graph.erase_node(linear)
