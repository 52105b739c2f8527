"""Makes one operator of a layer norm that a model writes out.

::

    before  %d = sub(%x, mean(%x, [-1], keepdim))
            mul(%d, rsqrt(add(mean(pow(%d, 2), [-1], keepdim), eps)))       also div(%d, sqrt(…)), pow(…, -0.5), var(%x)
            mul(%w, …), add(…, %b)                                           either or both, in this order
    after   aten.layer_norm(%x, [D], %w, %b, eps)
    left    what is divided by something else than its own standard deviation over the last axis

Source: Ba et al. 2016, Layer Normalization; the forms of transformers@5.23 (Cohere).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch.fx import Node

from calque.passes import Rewrites
from calque.patterns import aten, calls, mean_of, only_user, orders, square_of
from calque.traced import call

if TYPE_CHECKING:
    from calque.traced import TracedModel


@dataclass(frozen=True)
class FuseLayerNorm:
    """Every written-out layer norm is one operator with its weight and bias."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per norm, and the variances that make no norm."""
        count, skipped = 0, []
        vectors = {node for node in model.parameters().values() if node.meta["val"].dim() == 1}
        for node in list(model.graph.nodes):
            if (deviation := _deviation(node)) is None:
                continue
            value, epsilon = deviation
            normed = _normed(node, value)
            if normed is None:
                skipped.append((node.name, "it divides something else than what was centred"))
                continue
            last, weight, bias = _affine(normed, vectors)
            with model.graph.inserting_before(last):
                size = int(value.meta["val"].shape[-1])
                fused = call(model.graph, aten.layer_norm.default, value, [size], weight, bias, epsilon)
            last.replace_all_uses_with(fused)
            model.graph.erase_node(last)
            count += 1
        model.graph.eliminate_dead_code()
        return Rewrites(count, tuple(skipped))


def _deviation(node: Any) -> tuple[Node, float] | None:
    """Return x and epsilon where a node is the standard deviation of x over the last axis, or 1 by it; None if it is not."""
    if not (calls(node, aten.rsqrt.default) or calls(node, aten.sqrt.default)) and not (
        calls(node, aten.pow.Tensor_Scalar) and node.args[1] in (-0.5, 0.5)
    ):
        return None
    total = node.args[0]
    if not calls(total, aten.add.Tensor) or total.kwargs or not isinstance(epsilon := total.args[1], float):
        return None
    value = _of_variance(total.args[0])
    return None if value is None else (value, epsilon)


def _of_variance(variance: Any) -> Node | None:
    """Return x where a value is the mean of (x - mean(x))² over the last axis; None if it is not."""
    if calls(variance, aten.var.correction) or calls(variance, aten.var.dim):
        axes, biased = variance.args[1], variance.kwargs.get("correction") == 0 or variance.args[2:3] == (False,)
        kept = variance.kwargs.get("keepdim") is True or variance.args[3:4] == (True,)
        return variance.args[0] if list(axes) == [-1] and biased and kept else None
    return _centred(square_of(mean_of(variance)))


def _centred(value: Any) -> Node | None:
    """Return x where a value is x - mean(x)."""
    if not calls(value, aten.sub.Tensor) or value.kwargs or mean_of(value.args[1]) is not value.args[0]:
        return None
    found: Node = value.args[0]
    return found


def _normed(deviation: Node, value: Node) -> Node | None:
    """Return the one node that divides the centred value by its deviation; None if the deviation does something else."""
    user = only_user(deviation)
    if user is None or user.kwargs:
        return None
    if calls(deviation, aten.sqrt.default) or deviation.args[1:] == (0.5,):
        return user if calls(user, aten.div.Tensor) and user.args[1] is deviation and _centred(user.args[0]) is value else None
    if not calls(user, aten.mul.Tensor):
        return None
    return user if any(other is deviation and _centred(one) is value for one, other in orders(user)) else None


def _affine(normed: Node, vectors: set[Node]) -> tuple[Node, Node | None, Node | None]:
    """Return the last node of the norm, and the weight and bias that follow; each may be missing."""
    last, weight, bias = normed, None, None
    for target in (aten.mul.Tensor, aten.add.Tensor):
        user = only_user(last)
        if user is None or not calls(user, target) or user.kwargs:
            continue
        for one, other in orders(user):
            if one is last and other in vectors and other.meta["val"].shape == last.meta["val"].shape[-1:]:
                last, weight, bias = (user, other, None) if target is aten.mul.Tensor else (user, weight, other)
                break
    return last, weight, bias
