"""Joins a mixture whose experts' weights are integers: one operator runs the experts that a token chose, and those alone.

::

    before  up = matmul(unsqueeze(x, 0), transpose(reshape(calque.dequantize_weight(%u, …), [E, 2·I, H]), 1, 2)) + unsqueeze(%b, 1)
            gate, value = chunk(up, 2, -1)                  or up[..., 0::2], up[..., 1::2]
            down = matmul(silu(gate) * value, transpose(reshape(calque.dequantize_weight(%d, …), [E, H, I]), 1, 2)) + …
            sum(down * unsqueeze(transpose(routing, 0, 1), -1), 0)
    after   calque.packed_experts(x, routing, %up, %up_scale, %up_zero_point, %up_bias, %down, …, bits, group, chosen, alpha, beta, limit)
    left    experts without such a gate, with weights of different bits, or that are no integers: every expert sees every token
            8 bits where activations must not be rounded: ONNX Runtime's kernel rounds them whatever it is told

Rows of gate and value are laid alternately, and both weights get the shorter of their groups: the kernel knows no other.

Source: the schema and CPU kernel of com.microsoft.QMoE in onnxruntime 1.31.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from calque.packing import pack, pack_zero_points
from calque.passes import Rewrites
from calque.patterns import aten, calls, factors, orders
from calque.quantization import SHORTEST_GROUP, Bits, Scheme
from calque.traced import call, user_nodes
from calque.weights import Derived, torch_dtype_name

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque


@dataclass(frozen=True)
class FuseExperts:
    """``rounded``: activations may be rounded to 8 bits; without it experts of 8 bits are left alone."""

    rounded: bool = True

    after: ClassVar[frozenset[str]] = frozenset({"quantize_weights"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per mixture."""
        packing, count, skipped = _Packing(model), 0, []
        for node in user_nodes(model.graph.nodes, aten.sum.dim_IntList):
            routed = _routed(node)
            if routed is None:
                continue
            found = _mixture(*routed)
            why = found if isinstance(found, str) else self._refused(found)
            if isinstance(found, str) or why:
                skipped.append((node.name, str(why)))
                continue
            packing.join(node, found)
            count += 1
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))

    def _refused(self, found: _Mixture) -> str:
        """Return why the kernel cannot do the mixture; nothing where it can."""
        if any(weight.q.meta["val"].dtype != torch.int8 for weight in (found.up, found.down)):
            return "its weights are stored as fp8, which the kernel does not know"
        if found.up.bits != found.down.bits:
            return f"its weights are of {found.up.bits} and {found.down.bits} bits"
        if found.up.bits == 8 and not self.rounded:
            return "the kernel rounds activations where weights are of 8 bits"
        if (found.up.zero_point is None) != (found.down.zero_point is None):
            return "one of its weights has zero points, and the other has none"
        return "" if found.group >= SHORTEST_GROUP else f"its rows divide into no common group of {SHORTEST_GROUP} or more"


@dataclass(frozen=True)
class _Weight:
    """Integers [experts · out, in] and what goes with them; ``bias`` [experts, out]."""

    q: Node
    scale: Node
    zero_point: Node | None
    bits: Bits
    group: int
    experts: int
    bias: Node | None

    @property
    def size(self) -> int:
        return int(self.q.meta["val"].shape[1])


@dataclass(frozen=True)
class _Mixture:
    """``halves``: the rows of up are those of the gate and then those of the value, not alternately."""

    x: Node
    routing: Node
    chosen: int
    up: _Weight
    down: _Weight
    halves: bool
    alpha: float
    beta: float
    limit: float

    @property
    def group(self) -> int:
        """The longest group that both weights divide into; with zero points a row has two at least: the kernel lays one otherwise."""
        group = min(Scheme(weight.bits, weight.group).block(weight.size) for weight in (self.up, self.down))
        alone = self.up.zero_point is not None and group in (self.up.size, self.down.size)
        return group // 2 if alone else group


def _routed(total: Node) -> tuple[Any, Node, int] | None:
    """Return what is weighted and summed over experts, [E, T, H], the weights [T, E], and how many of a token are not 0."""
    if list(total.args[1]) != [0] or len(total.args) > 2:  # type: ignore[arg-type]
        return None
    for out, weights in factors(total.args[0]):
        if not calls(weights, aten.unsqueeze.default) or not calls(weights.args[0], aten.transpose.int):
            continue
        routing = weights.args[0].args[0]
        if calls(routing, aten.sum.dim_IntList) and list(routing.args[1]) == [1] and routing.args[0].meta["val"].dim() == 3:
            return out, routing, int(routing.args[0].meta["val"].shape[1])
    return None


def _mixture(out: Any, routing: Node, chosen: int) -> _Mixture | str:
    """Return the mixture that the weighted outputs of experts are of, or why they are of none that the kernel does."""
    down = _product(out)
    if down is None:
        return "its last product does not read integers as they come"
    gated = _gated(down[0])
    if gated is None:
        return "its experts have another gate than g · sigmoid(alpha · g) · (v + beta)"
    whole, halves, alpha, beta, limit = gated
    up = _product(whole)
    if up is None or not calls(up[0], aten.unsqueeze.default) or up[0].args[1] != 0:
        return "its first product does not read integers as they come"
    return _Mixture(up[0].args[0], routing, chosen, up[1], down[1], halves, alpha, beta, limit)


def _product(value: Any) -> tuple[Any, _Weight] | None:
    """Return what is multiplied and the weight, of a product of each expert, with its bias if it has one."""
    bias = None
    if calls(value, aten.add.Tensor):
        if not calls(value.args[1], aten.unsqueeze.default) or value.args[1].args[1] != 1:
            return None
        value, bias = value.args[0], value.args[1].args[0]
        if bias.op != "placeholder":
            return None
    if not calls(value, aten.matmul.default) or not calls(value.args[1], aten.transpose.int):
        return None
    laid = value.args[1].args[0]
    if not calls(laid, aten.reshape.default) or not calls(laid.args[0], calque.dequantize_weight.default):
        return None
    q, scale, zero_point, bits, _, group = laid.args[0].args
    return value.args[0], _Weight(q, scale, zero_point, bits, group, int(laid.meta["val"].shape[0]), bias)


def _gated(value: Any) -> tuple[Node, bool, float, float, float] | None:
    """Return what is split into gate and value, whether by halves, and alpha, beta and limit; None if it is gated otherwise."""
    for active, other in factors(value):
        for gate, alpha in _active(active):
            beta, limit = 0.0, 0.0
            if calls(other, aten.add.Tensor) and isinstance(other.args[1], int | float):
                other, beta = other.args[0], float(other.args[1])
            if calls(gate, aten.clamp.default) and calls(other, aten.clamp.default):
                limit = float(other.args[2])
                if (gate.args[1], *gate.args[2:], *other.args[1:]) != (None, limit, -limit, limit) or limit <= 0:
                    return None
                gate, other = gate.args[0], other.args[0]
            halves = _halves(gate, other)
            if halves is not None:
                return gate.args[0].args[0] if halves else gate.args[0], halves, alpha, beta, limit
    return None


def _active(value: Any) -> list[tuple[Any, float]]:
    """Return what g · sigmoid(alpha · g) is of, and alpha."""
    if calls(value, aten.silu.default):
        return [(value.args[0], 1.0)]
    found = []
    for gate, weight in factors(value):
        if calls(weight, aten.sigmoid.default):
            inner = weight.args[0]
            if inner is gate:
                found.append((gate, 1.0))
            elif calls(inner, aten.mul.Tensor):
                found += [(gate, float(alpha)) for same, alpha in orders(inner) if same is gate and isinstance(alpha, int | float)]
    return found


def _halves(gate: Any, value: Any) -> bool | None:
    """Return whether gate and value are the two halves of the last axis, or its even and odd places; None if neither."""
    last, end = 2, 2**63 - 1
    if calls(gate, aten.slice.Tensor) and calls(value, aten.slice.Tensor) and gate.args[0] is value.args[0]:
        return False if (gate.args[1:], value.args[1:]) == ((last, 0, end, 2), (last, 1, end, 2)) else None
    if not calls(gate, getitem) or not calls(value, getitem) or gate.args[0] is not value.args[0]:
        return None
    pieces: Any = gate.args[0]
    # A trace that torch made functional has the size of a half in place of their number.
    count = 2 if calls(pieces, aten.chunk.default) else int(gate.meta["val"].shape[-1]) if calls(pieces, aten.split.Tensor) else 0
    if pieces.args[1:] not in ((count, -1), (count, last)) or gate.meta["val"].shape != value.meta["val"].shape:
        return None
    return True if (gate.args[1], value.args[1]) == (0, 1) else None


@dataclass
class _Packing:
    model: TracedModel

    def __post_init__(self) -> None:
        self.names = {node: name for name, node in self.model.parameters().items()}

    def join(self, total: Node, found: _Mixture) -> None:
        """Let one operator do what the mixture does."""
        up = self._parts(found.up, found.group, alternate=found.halves)
        down = self._parts(found.down, found.group, alternate=False)
        with self.model.graph.inserting_before(total):
            settings = (found.up.bits, found.group, found.chosen, found.alpha, found.beta, found.limit)
            made = call(self.model.graph, calque.packed_experts.default, found.x, found.routing, *up, *down, *settings)
        made.meta = {**total.meta, "val": made.meta["val"]}
        total.replace_all_uses_with(made)
        self.model.graph.erase_node(total)

    def _parts(self, weight: _Weight, group: int, alternate: bool) -> tuple[Node | None, ...]:
        """Return packed integers, scales, zero points and biases, each expert's beside the others'."""
        rows, groups, bits = int(weight.q.meta["val"].shape[0]) // weight.experts, weight.size // group, weight.bits
        lay = partial(_laid, experts=weight.experts, alternate=alternate)
        times = groups // int(weight.scale.meta["val"].shape[1])

        def repeated(tensor: Tensor) -> Tensor:
            return lay(tensor).repeat_interleave(times, 1)

        def made(node: Node, what: str, function: Callable[[Tensor], Tensor], dtype: str, last: int) -> Node:
            shape = (weight.experts, rows, last) if last else (weight.experts, rows)
            name = f"{self.names[node]}.{what}"
            stored = self.model.weights[self.names[node]]
            moved = dtype != "uint8"
            derived = Derived((stored,), what, lambda tensor: function(tensor).reshape(shape), dtype, shape, moved=moved)
            return self.model.add_parameter(name, derived, like=node)

        zero_point, bias = weight.zero_point, weight.bias
        scale_type = torch_dtype_name(self.model.weights[self.names[weight.scale]])
        return (
            made(weight.q, "packed", lambda q: pack(lay(q), bits, group), "uint8", weight.size * bits // 8),
            made(weight.scale, "experts", repeated, scale_type, groups),
            zero_point
            and made(zero_point, "packed", lambda zero: pack_zero_points(repeated(zero), bits), "uint8", (groups * bits + 7) // 8),
            # A bias is one row to an expert, whose places are those of the outputs.
            bias and made(bias, "experts", lambda b: lay(b.reshape(-1, 1)), torch_dtype_name(self.model.weights[self.names[bias]]), 0),
        )


def _laid(tensor: Tensor, experts: int, alternate: bool) -> Tensor:
    """Return [E · rows, …] with the second half of each expert's rows between those of the first, where they alternate."""
    if not alternate:
        return tensor
    return tensor.reshape(experts, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
