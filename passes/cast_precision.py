"""Stores weights and states in a narrow type and computes in it, around islands of float32.

::

    before  %q = linear(%h, %w)                              all float32
            %s = softmax(add(matmul(%q, %k), %bias), -1)
            %l = linear(%h, %head)                           the logits
            %i = matmul(%h, dequantize_linear(%q, %scale))
    after   %w, %head, %past, %scale                         float16, cast when they are emitted
            %q = linear(%h, %w)                              float16
            %s = softmax(add(to(matmul(%q, %k), float32), %bias), -1)
            %l = to(linear(%h, %head), float32)
            %i = matmul(%h, dequantize_linear(%q, %scale))   float16, as its scales are

    float32 stays  what comes from positions, masks and constants alone (angles, ALiBi, what is added to scores), and what it meets
                   sums, powers, roots, exponentials, softmax; numbers that the narrow type cannot hold (a mask's lowest float32)
                   what a choice is made by (topk of a router), from the product that gives it
                   outputs that are no states
    inside         norms and attention compute in float32 whatever they are given; rotations are told their angles in the type of
                   what they turn; integers become numbers of the type of their scales

Scales become narrow too: neither does TensorRT build integers of 4 bits with float32 scales in front of narrow products, nor does ONNX
Runtime join them. Integers stay; what weights are then, ``TracedModel.replaced`` says.

It goes last: its casts would stand between what other passes look for. Source: the types that operators have under torch.autocast
(torch 2.13, docs/source/amp.md), whose choice this follows: products narrow, sums and exponentials wide, the rest as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import getitem, is_not
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from calque.choices import NarrowType
from calque.passes import Rewrites
from calque.patterns import aten, calls
from calque.quantized_ops import RoundTrip
from calque.quantized_weight import NUMBERS, with_scales
from calque.traced import call, refresh
from calque.weights import Derived

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque
WIDE = torch.float32

# What multiplies and adds up in float32 inside, so that only its result is rounded.
PRODUCTS = {
    aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum, aten.conv1d, aten.conv2d, aten.convolution,
    aten.scaled_dot_product_attention, calque.attention, calque.prefix_attention, calque.grouped_attention, calque.cache_update,
}  # fmt: skip
# What is in the type of its first argument, weights and angles with it; numbers among its arguments are not of that type.
FOLLOWING = {aten.layer_norm, aten.group_norm, calque.rms_norm, calque.flat_rms_norm, calque.rotary, calque.flat_rotary}
JOINED = {calque.add_rms_norm, calque.add_layer_norm}
# What leaves the range, or loses the digits, of a narrow type.
SUMS = {
    aten.pow, aten.square, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.exp, aten.expm1, aten.log, aten.log1p, aten.log2, aten.log10,
    aten.softmax, aten._softmax, aten.log_softmax, aten.logsumexp, aten.softplus, aten.sum, aten.mean, aten.var, aten.std, aten.norm,
    aten.linalg_vector_norm, aten.prod, aten.cumsum, aten.cumprod, aten.cosh, aten.sinh, aten.tan, aten.sin, aten.cos,
}  # fmt: skip
# What has scales, and where they are among its arguments; it is of their type, unless it rounds anew in each call.
SCALES = {
    calque.dequantize_weight: 1, calque.dequantize_linear: 1, calque.quantize_linear: 1,
    calque.dequantize_lookup: 2, calque.dynamic_linear: 2,
}  # fmt: skip
ROUNDING_ANEW = {calque.dynamic_linear, calque.round_activations}
CHOICES = {aten.topk, aten.sort, aten.argmax, aten.argmin, aten.argsort}

OF_POSITIONS = "comes from positions, masks or constants alone, which are counted in float32"


@dataclass(frozen=True)
class CastPrecision:
    """``dtype``: what weights are stored in; ``arithmetic``: whether states and most values are of that type too, or float32."""

    dtype: NarrowType = "float16"
    arithmetic: Literal["narrow", "float32"] = "narrow"

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per weight and state, and what stays float32."""
        narrow, scales = getattr(torch, self.dtype), _scales(model)
        if self.arithmetic == "float32":
            tables = {name for name, weight in model.weights.entries.items() if isinstance(weight, Derived) and weight.operation == NUMBERS}
            if count := model.cast_weights(self.dtype, computed=False, kept=scales | tables):
                _widen(model, narrow)
            return Rewrites(count)
        count = model.cast_weights(self.dtype, scales=scales) + model.cast_states(self.dtype)
        if not count:
            return Rewrites(0)
        model.replaced = {name: with_scales(weight, narrow) for name, weight in model.replaced.items()}
        model.rounding = {name: made.narrowed(narrow) if isinstance(made, RoundTrip) else made for name, made in model.rounding.items()}
        casting = _Casting(model, narrow)
        for node in list(model.graph.nodes):
            if node.op == "call_function":
                casting.settle(node)
        casting.settle_outputs()
        return Rewrites(count, tuple(casting.islands.items()))


def _scales(model: TracedModel) -> set[str]:
    """Return the names of the scales of integers."""
    names = {node: name for name, node in model.parameters().items()}
    read: list[Any] = [node.args[SCALES[_packet(node)]] for node in model.graph.nodes if _packet(node) in SCALES]
    return {names[scale] for scale in read if scale in names}


def _widen(model: TracedModel, narrow: torch.dtype) -> None:
    """Make what reads a weight read it in float32; of a table only the rows that are looked up."""
    for weight in model.parameters().values():
        readers = [user for user in weight.users if _packet(user) not in (aten._to_copy, aten.embedding)]
        if _dtype(weight) != narrow:
            continue
        if readers:
            with model.graph.inserting_before(next(node for node in model.graph.nodes if node.op != "placeholder")):
                wide = call(model.graph, aten._to_copy.default, weight, dtype=WIDE)
            for reader in readers:
                reader.replace_input_with(weight, wide)
        for rows in [user for user in weight.users if _packet(user) is aten.embedding]:
            refresh(rows)
            with model.graph.inserting_after(rows):
                wide = call(model.graph, aten._to_copy.default, rows, dtype=WIDE)
            rows.replace_all_uses_with(wide, delete_user_cb=partial(is_not, wide))


@dataclass
class _Casting:
    """The graph while its types are settled, node by node in order.

    ``computed``: what weights, states, inputs that are numbers, or other such values led to; all else is counted.
    """

    model: TracedModel
    narrow: torch.dtype
    islands: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        inputs = model.placeholders()
        self.states = {inputs[state.input] for state in model.states}
        weights = {node for node in model.parameters().values() if _dtype(node) == self.narrow}
        self.computed: set[Node] = weights | {node for node in inputs.values() if _dtype(node) is not None}
        self.constants = {
            node for node, name in model.constants().items() if node.meta["val"].dim() == 0 and self._holds(float(model.constant(name)))
        }
        self.last = {node: "goes out" for node in _before_products(self._outputs(), inclusive=False)}
        chosen_by = [node.all_input_nodes[0] for node in model.graph.nodes if _packet(node) in CHOICES]
        self.last |= {node: "a choice is made by it" for node in _before_products(chosen_by, inclusive=True)}
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}

    def _outputs(self) -> list[Node]:
        """Return the outputs that are no states."""
        kept = {state.output for state in self.model.states}
        returned: Any = self.model.output_node().args[0]
        return [node for node, spec in zip(returned, self.model.outputs, strict=True) if spec.name not in kept]

    def settle(self, node: Node) -> None:
        """Give the node's arguments one type, and the node what that makes of it."""
        if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list) or not self.computed.intersection(node.all_input_nodes):
            return
        self.computed.add(node)
        if node.target is getitem:
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]  # type: ignore[union-attr]
        floats = [value for value in node.all_input_nodes if _dtype(value) in (WIDE, self.narrow)]
        if not floats or _packet(node) is aten._to_copy:  # which says itself what it gives
            return
        wanted, why = self._type_of(node, floats)
        if why and any(_dtype(value) == self.narrow for value in floats):
            self.islands[node.name] = why
        for value in floats:
            if _dtype(value) != wanted:
                node.replace_input_with(value, self.cast(value, wanted, node))
        if node.kwargs.get("dtype") is None:
            # Not computed anew: not every operator can be, on the sizes of a trace.
            node.meta["val"] = pytree.tree_map_only(torch.Tensor, partial(self._cast, dtype=wanted), node.meta["val"])

    def _cast(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a value that is of one of the two types in either; others, those of 8 bits too, as they are."""
        return value.to(dtype) if value.dtype in (WIDE, self.narrow) else value

    def _type_of(self, node: Node, floats: list[Node]) -> tuple[torch.dtype, str]:
        """Return the type of the node's arguments and, where that is float32 though some are narrow, why."""
        packet = _packet(node)
        if packet in ROUNDING_ANEW:
            return WIDE, "what rounds anew in each call does so in float32"
        if packet in SCALES:
            return self.narrow, ""
        if packet in FOLLOWING or packet in JOINED:
            # Of a sum it is the stream that goes on: an island whose result is added to it ends there.
            leading = floats[: 2 if packet in JOINED else 1]
            return (WIDE, "what it is given is float32") if all(_dtype(value) == WIDE for value in leading) else (self.narrow, "")
        if self.states & set(floats) or packet is calque.grouped_attention:
            return self.narrow, ""
        if node in self.last:
            return WIDE, self.last[node]
        counted = [value for value in floats if _dtype(value) == WIDE and value not in self.constants]
        if packet in PRODUCTS:
            # Such as angles, or ALiBi that scores are added to: rounded, far positions could not be told apart.
            return (WIDE, f"{counted[0].name} {OF_POSITIONS}") if any(v not in self.computed for v in counted) else (self.narrow, "")
        if packet in SUMS or (packet is aten.mul and node.args[0] is node.args[1]):
            return WIDE, "its result may leave the range, or lose the digits, of the narrow type"
        if number := next((value for value in _numbers(node) if not self._holds(value)), None):
            return WIDE, f"the narrow type cannot hold {number:g}"
        if counted:
            return WIDE, f"{counted[0].name} is float32"
        return self.narrow, ""

    def _holds(self, number: float) -> bool:
        """Return whether the narrow type has a normal number near this one."""
        about = torch.finfo(self.narrow)
        return not math.isfinite(number) or number == 0 or about.tiny <= abs(number) <= about.max

    def cast(self, value: Node, dtype: torch.dtype, user: Node) -> Node:
        """Return the value in ``dtype``, made once, where its first user wants it."""
        if (value, dtype) not in self.casts:
            with self.model.graph.inserting_before(user):
                if calls(value, calque.mask_bias.default) or calls(value, calque.padding_bias.default):
                    made = call(self.model.graph, value.target, *value.args, dtype)
                else:
                    made = call(self.model.graph, aten._to_copy.default, value, dtype=dtype)
            self.casts[value, dtype] = made
            if value in self.computed:
                self.computed.add(made)
        return self.casts[value, dtype]

    def settle_outputs(self) -> None:
        """Make every output of the type that its spec says."""
        output = self.model.output_node()
        returned: Any = output.args[0]
        wanted = [getattr(torch, spec.dtype) for spec in self.model.outputs]
        output.args = (
            tuple(
                value if _dtype(value) in (None, dtype) else self.cast(value, dtype, output)
                for value, dtype in zip(returned, wanted, strict=True)
            ),
        )


def _packet(node: Node) -> Any:
    """Return the operator that a node calls, whatever its overload."""
    return getattr(node.target, "overloadpacket", node.target)


def _dtype(node: Node) -> torch.dtype | None:
    """Return the type of a node's value if that is one tensor of floating numbers."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else None


def _numbers(node: Node) -> Iterator[float]:
    """Yield the floating numbers among a node's arguments."""
    return (value for value in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(value, float))


def _before_products(values: list[Node], inclusive: bool) -> set[Node]:
    """Return the nodes that lead to the values, up to the products and norms that they begin with; these too if ``inclusive``."""
    found: set[Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop()
        if node in found or node.op != "call_function" or _dtype(node) is None or _packet(node) in FOLLOWING:
            continue
        if _packet(node) in PRODUCTS:
            found |= {node} if inclusive else set()
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return found
