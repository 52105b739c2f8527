"""Lays integers out as products of the standard read them, and joins those of 8 bits with activations of 8 bits.

::

    before  linear(%x, calque.dequantize_weight(%q[out, in], %scale, …), %b)
            linear(calque.round_activations(%x), calque.dequantize_weight(%q, %scale, None, 8, 1, 0), %b)
            embedding(calque.dequantize_weight(%q, …), %ids)
    after   add(matmul(%x, calque.dequantize_linear(%q_t[in, out], %scale_t, …)), %b)      q_t = Derived(transpose, q)
            calque.dynamic_linear(%x, %q_t, %scale, %b)
            calque.dequantize_lookup(%ids, %q, %scale, …)                                  the columns of %q_t where a head reads it
    or      embedding(%numbers, %ids)                      tables: numbers          numbers = Derived(numbers, q, scale, …) float32
            reshape(calque.dequantize_linear(%q[out, in], %scale, None, 8, 0, 0), …)       what is no product, with one scale an output
    left    tables of 4 bits, of which no operator of the standard reads entries: they are numbers before they are looked up

Runtimes know a product with integers by their lying [in, out]. A tied table is stored once, as its head reads it; with ``tables``
``numbers`` once more as numbers, for runtimes that have integers in front of products alone, as TensorRT. Where the weight is not of
8 bits per channel, without zero points, in the format that activations are rounded to, they are not: no runtime would gain by it.

Source: DequantizeLinear of the ONNX standard; what ONNX Runtime 1.31 joins, core/optimizer/qdq_transformer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.fx import Node

from calque.passes import Rewrites
from calque.patterns import aten, calls
from calque.products import PRODUCTS, reads_rows
from calque.quantized_weight import numbers_of
from calque.traced import call, user_nodes
from calque.weights import Derived, Weight, torch_dtype_name, transpose

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque


@dataclass(frozen=True)
class LayOutIntegers:
    """Every product with integers, and every lookup in a table of them, reads them as the standard's operators do.

    ``tables``: what lookups read, the integers or, where a runtime takes none there, the numbers that they stand for.
    """

    tables: Literal["integers", "numbers"] = "integers"

    after: ClassVar[frozenset[str]] = frozenset({"quantize_weights"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per product and lookup."""
        laying, skipped = _Laying(model), _take_back_rounding(model)
        count = len(skipped)
        weights: dict[Any, list[Node]] = {}
        for node in user_nodes(model.graph.nodes, calque.dequantize_weight.default):
            weights.setdefault(node.args[0], []).append(node)
        for tied in weights.values():
            users = [(user, weight) for weight in tied for user in list(weight.users)]
            if odd := next((user for user, weight in users if not reads_rows(user, weight)), None):
                skipped.append((tied[0].name, f"{odd.target} reads it, which is no product and no lookup"))
                count += sum(laying.by_channel(weight) for weight in tied)
                continue
            product = any(user.target is aten.linear.default for user, _ in users)
            for user, weight in users:
                if self.tables == "numbers" and user.target is aten.embedding.default:
                    laying.look_up_numbers(user, weight)
                else:
                    laying.replace(user, weight, inputs_first=product)
            count += len(users)
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        return Rewrites(count, tuple(skipped))


def _take_back_rounding(model: TracedModel) -> list[tuple[str, str]]:
    """Return the products whose values are no longer rounded, because their weights do not go with it."""
    taken, names = [], {node: name for name, node in model.parameters().items()}
    for node in model.graph.nodes:
        if node.target not in PRODUCTS:
            continue
        weight: Any = node.args[PRODUCTS[node.target].weight]
        value = next((given for given in node.all_input_nodes if given is not weight and unrounded(given) is not None), None)
        if value is None or _goes_with(value, weight) or calls(weight, calque.dequantize_linear.default):
            continue
        node.replace_input_with(value, unrounded(value))
        if weight in names:
            model.rounding.pop(names[weight], None)
        taken.append((node.name, f"its values are not rounded: its weight is not of {_format(value)} per channel without zero points"))
    return taken


def unrounded(value: Any) -> Any:
    """Return what a value was before it was rounded; None if it was not."""
    if calls(value, calque.round_activations.default):
        return value.args[0]
    quantized = calls(value, calque.dequantize_linear.default) and calls(value.args[0], calque.quantize_linear.default)
    return value.args[0].args[0] if quantized else None


def _goes_with(value: Node, weight: Any) -> bool:
    """Return whether a weight of 8 bits, with one scale an output and no zero points, is of the format that a value was rounded to."""
    if not calls(weight, calque.dequantize_weight.default) or weight.args[2] is not None or weight.args[3] != 8 or weight.args[5]:
        return False
    return bool((weight.args[0].meta["val"].dtype == torch.float8_e4m3fn) == (_format(value) == "fp8"))


def _format(value: Node) -> str:
    """Return what the weights must be stored as that go with a rounded value."""
    integers: Any = value.args[0]
    static = calls(value, calque.dequantize_linear.default)
    return "fp8" if static and integers.meta["val"].dtype == torch.float8_e4m3fn else "int8"


@dataclass
class _Laying:
    """The parameters that were laid out so far, by those that they hold and how they lie."""

    model: TracedModel
    made: dict[tuple[Node, str], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {node: name for name, node in self.model.parameters().items()}

    def replace(self, user: Node, weight: Node, inputs_first: bool) -> None:
        """Let a node read the weight's integers; ``inputs_first``: they lie [in, out]."""
        arguments: Any = weight.args
        q, scale, zero_point, bits, _, group = arguments
        parts = [self._laid(part, group == 0 and part is not q, inputs_first) for part in (q, scale, zero_point)]
        graph, given = self.model.graph, user.args
        with graph.inserting_before(user):
            if user.target is aten.embedding.default and bits == 8:
                made = call(graph, calque.dequantize_lookup.default, given[1], *parts, int(inputs_first), group)
            elif calls(given[0], calque.round_activations.default):
                bias = given[2] if len(given) > 2 else None
                made = call(graph, calque.dynamic_linear.default, given[0].args[0], *parts[:2], bias)  # type: ignore[union-attr]
            else:
                along = int(inputs_first) if not group else int(not inputs_first)
                made = call(graph, calque.dequantize_linear.default, *parts, bits, along, group)
                made = self._read(user, made, inputs_first)
        made.meta = {**user.meta, "val": made.meta["val"]}
        user.replace_all_uses_with(made)
        self.model.graph.erase_node(user)

    def by_channel(self, weight: Node) -> bool:
        """Return whether integers of one scale an output are numbers by it, as they lie, instead of by blocks as long as a row."""
        arguments: Any = weight.args
        if arguments[5]:
            return False
        parts = [self._laid(part, part is not arguments[0], False) for part in arguments[:3]]
        with self.model.graph.inserting_before(weight):
            made = call(self.model.graph, calque.dequantize_linear.default, *parts, arguments[3], 0, 0)
        weight.replace_all_uses_with(made)
        self.model.graph.erase_node(weight)
        return True

    def look_up_numbers(self, user: Node, weight: Node) -> None:
        """Let a lookup read what the weight's integers stand for, a parameter of its own."""
        arguments: Any = weight.args
        q: Node = arguments[0]
        if (q, "numbers") not in self.made:
            held = [self.model.weights[self.names[part]] for part in arguments[:3] if part is not None]
            name = f"{self.names[q].removesuffix('.q')}.numbers"
            self.made[q, "numbers"] = self.model.add_parameter(name, numbers_of(*held, group=arguments[5]), like=q)
        user.replace_input_with(weight, self.made[q, "numbers"])

    def _read(self, user: Node, weight: Node, inputs_first: bool) -> Node:
        """Return the product with a weight [in, out], or the lookup in a table of numbers."""
        graph, given = self.model.graph, user.args
        if user.target is aten.embedding.default:
            table = call(graph, aten.permute.default, weight, [1, 0]) if inputs_first else weight
            return call(graph, aten.embedding.default, table, given[1])
        made = call(graph, aten.matmul.default, given[0], weight)
        bias = given[2] if len(given) > 2 else None
        return made if bias is None else call(graph, aten.add.Tensor, made, bias)

    def _laid(self, node: Node | None, one_each: bool, inputs_first: bool) -> Node | None:
        """Return the parameter transposed if ``inputs_first``, or as a vector if it has one value an output."""
        how = "each" if one_each else "transposed" if inputs_first else ""
        if node is None or not how:
            return node
        if (node, how) not in self.made:
            weight = self.model.weights[self.names[node]]
            made = _flat(weight) if one_each else transpose(weight)
            self.made[node, how] = self.model.add_parameter(f"{self.names[node]}.{how}", made, like=node)
        return self.made[node, how]


def _flat(weight: Weight) -> Derived:
    """Return a column [out, 1] as a vector."""
    return Derived((weight,), "flatten", lambda column: column.reshape(-1), torch_dtype_name(weight), (weight.shape[0],))
