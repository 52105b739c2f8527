"""Where the channels of a value can be divided: in the norm that gives it, or in the rows of the product that it comes from.

::

    norm      mul(%normed, %w)            %w / s                  mul(%normed, add(%w, 1))     (%w + 1) / s - 1
              layer_norm(%x, [n], %w, %b) %w / s, %b / s
    product   linear(mul(%gate, linear(%h, %up, %b)), %down)      rows of %up and %b / s
              linear(reshape(transpose(attention(…, v))), %o)     rows of %v and %b / s; one scale for all heads that share a value

Only where nothing but products with quantized weights reads the value. Source: AWQ, arXiv 2306.00978, and its auto_scale.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from calque.calibration import RESHAPES, Product, unshaped
from calque.patterns import aten, calls, factors, only_user

if TYPE_CHECKING:
    from calque.traced import TracedModel

attention = torch.ops.calque.attention.default
cache_update = torch.ops.calque.cache_update.default


@dataclass(frozen=True)
class Fold:
    """What is divided so that a value is: ``vectors``, parameters [channels], by name, of which so much plus the parameter counts.

    ``rows``: the name of the weight whose rows are divided; empty for none. ``heads``: heads of the value that share one of its rows'
    heads, ``groups`` the number of these.
    """

    vectors: tuple[tuple[str, float], ...]
    rows: str = ""
    groups: int = 1
    heads: int = 1

    def shared(self, channels: Tensor) -> Tensor:
        """Return channels with those that are divided together at their mean."""
        return self.spread(self.divisors(channels))

    def divisors(self, channels: Tensor) -> Tensor:
        """Return one figure for each row that is divided, of one for each channel."""
        return channels.reshape(self.groups, self.heads, -1).mean(1).reshape(-1)

    def spread(self, rows: Tensor) -> Tensor:
        """Return one figure for each channel, of one for each row."""
        return rows.reshape(self.groups, 1, -1).expand(-1, self.heads, -1).reshape(-1)


def divided(vector: Tensor, offset: float, divisors: Tensor) -> Tensor:
    """Return a parameter of which ``offset`` plus itself counts, so that what counts is divided."""
    return ((vector.to(torch.float32) + offset) / divisors - offset).to(torch.float32)


@dataclass(frozen=True)
class Folder:
    """Finds where channels can be divided; ``weights`` are the products whose weights are quantized, by the node of the weight."""

    model: TracedModel
    weights: dict[Node, str]

    def fold(self, products: Sequence[Product]) -> Fold | str:
        """Return where the value that the products read is divided, or why nowhere."""
        value = products[0].read
        if other := _other_reader(value, {product.node for product in products}):
            return f"{other.target} reads the value as well"
        return self._norm(value) or self._gated(value) or self._attended(value) or "it comes from no norm and straight from no product"

    def _norm(self, value: Node) -> Fold | None:
        if calls(value, aten.layer_norm.default):
            given: Any = value.args
            vectors = [self._vector(one, value) for one in given[2:4] if one is not None]
            return Fold(tuple(vectors)) if vectors and len(given[1]) == 1 and all(vectors) else None  # type: ignore[arg-type]
        for _, weight in factors(value):
            offset, user = 0.0, value
            if calls(weight, aten.add.Tensor) and isinstance(weight.args[1], int | float) and only_user(weight) is value:
                offset, user, weight = float(weight.args[1]), weight, weight.args[0]
            if isinstance(weight, Node) and (vector := self._vector(weight, user, offset)):
                return Fold((vector,))
        return None

    def _gated(self, value: Node) -> Fold | None:
        for gate, product in factors(value):
            if isinstance(gate, Node) and gate is not product and (fold := self._product(product, value)):
                return fold
        return None

    def _attended(self, value: Node) -> Fold | None:
        """Find the product that values of attention are the output of, with the heads alone between."""
        heads: Any = value.args[0] if calls(value, aten.reshape.default) else None
        seen: Any = heads.args[0] if calls(heads, aten.transpose.int) and set(heads.args[1:]) == {1, 2} else None
        if not calls(seen, attention) or only_user(heads) is not value or only_user(seen) is not heads:
            return None
        whole = seen.args[2]
        added: Any = whole.args[1] if calls(whole, cache_update) and only_user(whole) is seen else whole
        if not calls(added, aten.transpose.int) or set(added.args[1:]) != {1, 2} or only_user(added) is None:
            return None
        split: Any = added.args[0]
        if not calls(split, aten.reshape.default) or only_user(split) is not added:
            return None
        fold = self._product(split.args[0], split)
        size, queries = added.meta["val"].shape[-1], seen.meta["val"].shape[1]
        groups = added.meta["val"].shape[1]
        if fold is None or self.model.weights[fold.rows].shape[0] != groups * size or value.meta["val"].shape[-1] != queries * size:
            return None
        return Fold(fold.vectors, fold.rows, int(groups), int(queries // groups))

    def _product(self, product: Any, reader: Node) -> Fold | None:
        """Return the fold into the rows of a linear layer that ``reader`` alone reads."""
        if not calls(product, aten.linear.default) or only_user(product) is not reader or product.args[1] not in self.weights:
            return None
        bias = product.args[2] if len(product.args) > 2 else None
        vectors = () if bias is None else (self._vector(bias, product),)
        return Fold(vectors, self.weights[product.args[1]]) if all(vectors) else None  # type: ignore[arg-type]

    def _vector(self, node: Node, user: Node, offset: float = 0.0) -> tuple[str, float] | None:
        """Return the name of a parameter that is a vector which one node alone reads."""
        name = next((name for name, parameter in self.model.parameters().items() if parameter is node), "")
        alone = name and only_user(node) is user and not self.model.weights.tied(name)
        return (name, offset) if alone and len(node.meta["val"].shape) == 1 and node.meta["val"].is_floating_point() else None


def _other_reader(value: Node, products: set[Node]) -> Node | None:
    """Return what reads a value, or a reshape of it, and is none of the products."""
    for user in value.users:
        if user.target in RESHAPES and unshaped(user) is unshaped(value):
            if other := _other_reader(user, products):
                return other
        elif user not in products:
            return user
    return None
