"""Makes one operator of a root-mean-square norm that a model writes out.

::

    before  %r = rsqrt(add(mean(pow(%x, 2), [-1], keepdim), eps))      also pow(…, -0.5)
            mul(%w, mul(%x, %r))                                        also mul(…, %w), mul(…, add(%w, 1)), or no weight
    after   calque.rms_norm(%x, %w, eps)                                %w + 1 = Derived(add 1, w)
    left    what divides by a mean square without being a norm over the last axis

Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization; the forms of transformers@5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from calque.passes import Rewrites
from calque.patterns import aten, calls, mean_of, only_user, orders, square_of
from calque.traced import call
from calque.weights import Derived, Weight

if TYPE_CHECKING:
    from torch.fx import Node

    from calque.traced import TracedModel


@dataclass(frozen=True)
class FuseRmsNorm:
    """Every written-out norm by root mean square is one operator with its weight."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per norm, and the means of squares that make no norm."""
        count, skipped = 0, []
        names = {node: name for name, node in model.parameters().items()}
        for root in [node for node in model.graph.nodes if _is_reciprocal_root(node)]:
            if (found := _mean_square(root)) is None:
                continue
            value, epsilon = found
            normed = only_user(root)
            if normed is None or not calls(normed, aten.mul.Tensor) or value not in normed.args:
                skipped.append((root.name, "its result multiplies something else than what was squared"))
                continue
            last, weight = _weighted(model, names, normed)
            with model.graph.inserting_before(last):
                fused = call(model.graph, torch.ops.calque.rms_norm.default, value, weight, epsilon)
            last.replace_all_uses_with(fused)
            model.graph.erase_node(last)
            count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _is_reciprocal_root(node: Any) -> bool:
    return calls(node, aten.rsqrt.default) or (calls(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5)


def _mean_square(root: Any) -> tuple[Node, float] | None:
    """Return x and epsilon of 1 / √(mean(x²) + epsilon) over the last axis."""
    total = root.args[0]
    if not calls(total, aten.add.Tensor) or not isinstance(epsilon := total.args[1], float):
        return None
    value = square_of(mean_of(total.args[0]))
    return None if value is None else (value, epsilon)


def _weighted(model: TracedModel, names: dict[Node, str], normed: Node) -> tuple[Node, Node | None]:
    """Return the last node of the norm, and its weight: none where what follows is no product with a vector of parameters."""
    product = only_user(normed)
    if product is None or not calls(product, aten.mul.Tensor):
        return normed, None
    size = normed.meta["val"].shape[-1]
    for one, other in orders(product):
        if one is normed and (weight := _vector(model, names, other, size)) is not None:
            return product, weight
    return normed, None


def _vector(model: TracedModel, names: dict[Node, str], value: Any, size: int) -> Node | None:
    """Return the parameter of ``size`` elements that a factor is; a new one where the factor is a parameter and 1."""
    if value in names and tuple(value.meta["val"].shape) == (size,):
        node: Node = value
        return node
    if calls(value, aten.add.Tensor) and value.args[1] == 1 and value.args[0] in names:
        name = names[value.args[0]]
        if model.weights[name].shape != (size,):
            return None
        one_more = f"{name}.plus_one"
        if one_more in model.weights:
            return model.parameters()[one_more]
        return model.add_parameter(one_more, _plus_one(model.weights[name]), like=value.args[0])
    return None


def _plus_one(weight: Weight) -> Derived:
    return Derived((weight,), "add(1)", lambda tensor: tensor.float() + 1, "float32", weight.shape, moved=False)
