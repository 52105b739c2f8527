"""Makes one operator of a GELU or SiLU that a model writes out.

::

    before  mul(mul(%x, 0.5), add(tanh(p(%x)), 1))      p = √(2/π)·(x + 0.044715·x³), however it is multiplied out
            mul(mul(%x, 0.5), add(erf(%x / √2), 1))
            mul(%x, sigmoid(%x)), mul(%x, sigmoid(mul(%x, 1.702)))
    after   aten.gelu(%x, approximate="tanh"), aten.gelu(%x), aten.silu(%x), calque.quick_gelu(%x, 1.702)
    left    other polynomials; gates, whose sigmoid multiplies something else than it is taken of

Source: Hendrycks and Gimpel 2016, Gaussian Error Linear Units; the forms of transformers@5.23, activations.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from calque.passes import Rewrites
from calque.patterns import aten, calls, only_user, orders
from calque.traced import call

if TYPE_CHECKING:
    from calque.traced import TracedModel

Polynomial = dict[int, float]

TANH: Polynomial = {1: math.sqrt(2 / math.pi), 3: 0.044715 * math.sqrt(2 / math.pi)}
ERF: Polynomial = {1: math.sqrt(0.5)}


@dataclass(frozen=True)
class FuseGelu:
    """Every written-out GELU or SiLU is one operator."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per activation, and what begins as one without being one."""
        count, skipped = 0, []
        for node in list(model.graph.nodes):
            found = _gated(node) if calls(node, aten.sigmoid.default) else _gelu(node)
            if found is None:
                continue
            if isinstance(found, str):
                skipped.append((node.name, found))
                continue
            last, target, arguments, keywords = found
            with model.graph.inserting_before(last):
                fused = call(model.graph, target, *arguments, **keywords)
            last.replace_all_uses_with(fused)
            model.graph.erase_node(last)
            count += 1
        model.graph.eliminate_dead_code()
        return Rewrites(count, tuple(skipped))


Found = tuple[Node, Any, tuple[Any, ...], dict[str, Any]]


def _gated(sigmoid: Any) -> Found | None:
    """Return x · sigmoid(alpha · x) as one operator; None where something else is gated, which is no activation."""
    product = only_user(sigmoid)
    if product is None or not calls(product, aten.mul.Tensor) or product.kwargs:
        return None
    for value, other in orders(product):
        if other is not sigmoid or not isinstance(value, Node):
            continue
        inner = _polynomial(sigmoid.args[0], value)
        if inner is None or inner.keys() != {1} or inner[1] <= 0:
            continue
        if inner[1] == 1.0:
            return product, aten.silu.default, (value,), {}
        return product, torch.ops.calque.quick_gelu.default, (value, inner[1]), {}
    return None


def _gelu(node: Any) -> Found | str | None:
    """Return x / 2 · (1 + f(p(x))) as one operator, why it is none, or None where nothing looks like one."""
    if not calls(node, aten.tanh.default) and not calls(node, aten.erf.default):
        return None
    one_more = only_user(node)
    if one_more is None or not calls(one_more, aten.add.Tensor) or one_more.kwargs or not any(part == 1 for part in one_more.args):
        return None
    wanted, keywords = (TANH, {"approximate": "tanh"}) if calls(node, aten.tanh.default) else (ERF, {})
    product = only_user(one_more)
    reason = "it is multiplied with something else than half of what it is taken of"
    while product is not None and (calls(product, aten.mul.Tensor) or calls(product, aten.div.Tensor)) and not product.kwargs:
        for factor, value in _without(product, one_more):
            inner = _polynomial(node.args[0], value)
            if inner is None or not math.isclose(factor, 0.5):
                continue
            if inner.keys() == wanted.keys() and all(math.isclose(inner[power], wanted[power], rel_tol=1e-6) for power in wanted):
                return product, aten.gelu.default, (value,), keywords
            reason = f"its polynomial is {inner}, which is not that of GELU"
        product = only_user(product)
    return reason


def _without(product: Any, part: Any) -> Iterator[tuple[float, Node]]:
    """Yield c and x where a product is c · x · part, in every way that it can be read so."""
    for factor, rest in _scaled(product):
        if not calls(rest, aten.mul.Tensor) or rest.kwargs:
            continue
        for one, other in orders(rest):
            for more, inner in _scaled(other):
                if inner is part:
                    yield from ((factor * more * again, value) for again, value in _scaled(one) if isinstance(value, Node))


def _scaled(value: Any) -> Iterator[tuple[float, Any]]:
    """Yield c and v for all v of which a value is c times."""
    factor = 1.0
    while True:
        yield factor, value
        number = _number(value.args[1]) if calls(value, aten.mul.Tensor) or calls(value, aten.div.Tensor) else None
        if number is None or value.kwargs or number == 0:
            return
        factor = factor * number if value.target is aten.mul.Tensor else factor / number
        value = value.args[0]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _polynomial(value: Any, x: Node) -> Polynomial | None:
    """Return by power of ``x`` what a value is the sum of; None where it is made in other ways."""
    if value is x:
        return {1: 1.0}
    if (number := _number(value)) is not None:
        return {0: number}
    if not isinstance(value, Node) or value.kwargs or value.op != "call_function":
        return None
    if value.target is aten.pow.Tensor_Scalar and isinstance(value.args[1], int | float) and value.args[1] in (2, 3):
        base = _polynomial(value.args[0], x)
        return None if base is None else _power(base, int(value.args[1]))
    if value.target not in (aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor):
        return None
    one, other = (_polynomial(part, x) for part in value.args[:2])
    if one is None or other is None:
        return None
    if value.target is aten.add.Tensor:
        return {power: one.get(power, 0.0) + other.get(power, 0.0) for power in one.keys() | other.keys()}
    if value.target is aten.mul.Tensor:
        return _product(one, other)
    return {power: weight / other[0] for power, weight in one.items()} if other.keys() == {0} and other[0] else None


def _product(one: Polynomial, other: Polynomial) -> Polynomial:
    made: Polynomial = {}
    for power, weight in one.items():
        for more, factor in other.items():
            made[power + more] = made.get(power + more, 0.0) + weight * factor
    return made


def _power(base: Polynomial, exponent: int) -> Polynomial:
    made: Polynomial = {0: 1.0}
    for _ in range(exponent):
        made = _product(made, base)
    return made
