"""Stores the weights of linear layers and embeddings as integers of 4 or 8 bits, and says how they become numbers again.

::

    before  linear(%x, %w, %b)                        %w float32 [out, in]
            embedding(%table, %ids)                   the head's weight as well, where they are tied
    after   linear(%x, calque.dequantize_weight(%q, %scale, %zero_point, bits, 1, group), %b)
            embedding(calque.dequantize_weight(%q, …), %ids)
    left    weights of other operators (experts, convolutions), rows that no group of 16 or more divides, what an override keeps

It goes first: parameters then have the names of the checkpoint, and what joins layers joins their integers. Activations stay as
they are. The integers are those of every target.

Source: round to nearest with a search over narrower ranges; AWQ, arXiv 2306.00978; GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from calque.calibrated import Awq, Calibration, Gptq
from calque.calibration import PRODUCTS, products_of
from calque.errors import UsageError
from calque.passes import Rewrites
from calque.patterns import aten
from calque.quantization import SHORTEST_GROUP, Part, QuantizedWeight, Scheme, quantize
from calque.traced import call
from calque.weights import Derived, Weight, transpose

if TYPE_CHECKING:
    from calque.traced import TracedModel

Storage = Literal["keep", "int4", "int8"]
BITS: dict[str, Literal[4, 8]] = {"int4": 4, "int8": 8}
# What `auto` is where there is text to measure the model on.
CALIBRATED: Literal["awq", "gptq"] = "gptq"

# The parameters that are one weight: its name, and the node it has by that name.
Owners = list[tuple[str, Node]]
Parts = dict[Part, Node]


@dataclass(frozen=True)
class QuantizeWeights:
    """``bits`` and ``group`` (0: one scale an output) of linear layers; ``symmetric``: no zero points.

    ``search``: narrower ranges are tried as well. ``embedding``, ``head``: what tables and the last product are stored as; where
    both are one weight, ``head`` says. ``overrides``: what the weights are stored as whose names fit a pattern, the first that does.
    ``method``: ``nearest`` rounds to nearest; ``awq`` and ``gptq`` measure the model on text first. ``auto`` is nearest without such
    text, and gptq with it: at int4 in groups of 32 the built-in model's perplexity grows by 0.48 % with gptq, 0.99 % with awq, 0.96 %
    with nearest (benchmarks/quantization/methods.md). Tables, and weights that several products read, are rounded to nearest.
    """

    bits: Literal[4, 8] = 4
    group: int = 32
    symmetric: bool = True
    search: bool = True
    embedding: Storage = "int8"
    head: Storage = "int8"
    overrides: dict[str, Storage] = field(default_factory=dict)
    method: Literal["auto", "nearest", "awq", "gptq"] = "auto"

    after: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse groups that no runtime has kernels for."""
        if self.group and (self.group not in (16, 32, 64, 128, 256)):
            raise ValueError(f"group: must be 16, 32, 64, 128, 256, or 0 for one scale an output; found {self.group}")

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per weight.

        Raises:
            UsageError: a calibrated method without a text to calibrate on.
        """
        if self.method in ("awq", "gptq") and not model.samples:
            raise UsageError(f"{self.method} measures the model on a text, and there is none", fix="--calibration FILE, or method: nearest")
        planned: list[tuple[Owners, Scheme]] = []
        skipped = []
        heads = _heads(model)
        for owners in _owners(model):
            found = self._scheme(owners, heads, model)
            if isinstance(found, str):
                skipped.append((owners[0][0], found))
            else:
                planned.append((owners, found))
        calibration, measured = self._calibration(model, planned)
        for owners, scheme in planned:
            make = partial(quantize, scheme=scheme)
            if calibration and (name := measured.get(owners[0][1])):
                make = partial(calibration.quantized, name)
            stored = QuantizedWeight(_laid(model.weights[owners[0][0]], _inputs_first(owners)), scheme, make)
            parts = _add(model, owners, stored)
            dequantized = transpose(stored.dequantized()) if _inputs_first(owners) else stored.dequantized()
            for owner, node in owners:
                _replace(model, node, parts, scheme)
                model.replaced[owner] = dequantized
        if calibration:
            _divide(model, calibration)
        model.drop_unused_parameters()
        return Rewrites(len(planned), (*skipped, *(calibration.left if calibration else ())))

    def _calibration(self, model: TracedModel, planned: list[tuple[Owners, Scheme]]) -> tuple[Calibration | None, dict[Node, str]]:
        """Return what gives calibrated integers, and the names it knows weights by that one product alone reads."""
        method = CALIBRATED if self.method == "auto" and model.samples else self.method
        if method not in ("awq", "gptq"):
            return None, {}
        schemes = {node: scheme for owners, scheme in planned if len(owners) == 1 for _, node in owners if len(node.users) == 1}
        products = [product for product in products_of(model) if product.parameter in schemes]
        named = {product.weight: schemes[product.parameter] for product in products}
        key = (method, tuple(named.items()), model.samples)
        if products and key not in model.calibrations:
            before = model.copy()
            again = [product for product in products_of(before) if product.weight in named]
            model.calibrations[key] = (
                Awq(before, model.samples, again, named) if method == "awq" else Gptq(before, model.samples, again, named, model.scratch)
            )
        return model.calibrations.get(key), {product.parameter: product.weight for product in products}

    def _scheme(self, owners: Owners, heads: set[Node], model: TracedModel) -> Scheme | str:
        """Return how the weight is quantized, or why it is not."""
        users = [user for _, node in owners for user in node.users]
        if odd := next((user for user in users if _reads(user, owners) is None), None):
            return f"read by {odd.target}, which is no linear layer and no embedding"
        if len({_reads(user, owners) for user in users} - {"table"}) > 1:
            return "read both as [in, out] and as [out, in]"
        storage = self._storage(owners, heads, any(_reads(user, owners) == "table" for user in users))
        if storage == "keep":
            return "kept as it is"
        rows = model.weights[owners[0][0]].shape[0 if _inputs_first(owners) else 1]
        # A group of a table is read as the product reads it: per channel means a whole row in both.
        scheme = Scheme(BITS[storage], self.group, self.symmetric, self.search and BITS[storage] == 4).fitted(rows)
        return scheme or f"its rows of {rows} divide into no group of {SHORTEST_GROUP} or more"

    def _storage(self, owners: Owners, heads: set[Node], table: bool) -> Storage:
        for pattern, storage in self.overrides.items():
            if any(fnmatchcase(name, pattern) for name, _ in owners):
                return storage
        if any(user in heads for _, node in owners for user in node.users):
            return self.head
        return self.embedding if table else ("int4" if self.bits == 4 else "int8")


def _owners(model: TracedModel) -> list[Owners]:
    """Return the parameters that are float matrices, tied ones together, each with its name."""
    found: dict[int, Owners] = {}
    for name, node in model.parameters().items():
        if node.users and len(model.weights[name].shape) == 2 and node.meta["val"].is_floating_point():
            found.setdefault(id(model.weights[name]), []).append((name, node))
    return list(found.values())


def _heads(model: TracedModel) -> set[Node]:
    """Return the products that logits come from without another between them."""
    outputs: Any = model.output_node().args[0]
    stack = [node for node, spec in zip(outputs, model.outputs, strict=True) if spec.name == "logits"]
    found: set[Node] = set()
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node.target in PRODUCTS:
            found.add(node)
        elif node not in seen:
            stack += node.all_input_nodes
        seen.add(node)
    return found


def _reads(user: Node, owners: Owners) -> str | None:
    """Return how a node reads the weight: as a table, as [out, in] or as [in, out]; None where it does something else with it."""
    nodes = {node for _, node in owners}
    place = PRODUCTS.get(user.target, (None,))[0]
    if user.target is aten.embedding.default:
        return "table" if user.args[0] in nodes else None
    if place is None or user.args[place] not in nodes or len(nodes.intersection(user.all_input_nodes)) > 1:
        return None
    return "outputs first" if user.target is aten.linear.default else "inputs first"


def _inputs_first(owners: Owners) -> bool:
    """Return whether the weight lies [in, out], as GPT-2's do."""
    return any(_reads(user, owners) == "inputs first" for _, node in owners for user in node.users)


def _laid(weight: Weight, inputs_first: bool) -> Weight:
    """Return the weight as [out, in], in the type that it is stored in: to integers it goes from there."""
    stored = weight.sources[0] if isinstance(weight, Derived) and weight.operation == "cast(float32)" else weight
    return transpose(stored) if inputs_first else stored


def _add(model: TracedModel, owners: Owners, weight: QuantizedWeight) -> Parts:
    """Return the new parameters that hold the weight's integers, scales and zero points."""
    name, like = owners[0]
    return {part: model.add_parameter(f"{name}.{part}", made, like=like) for part, made in weight.parts().items()}


def _divide(model: TracedModel, calibration: Calibration) -> None:
    """Let the vectors that take scales back be what the calibration makes of them."""
    for name in calibration.divided:
        weight = model.weights[name]
        read = partial(_divided, weight, calibration, name)
        made = Derived((), "divide", read, "float32", tuple(weight.shape), moved=False)
        model.weights.entries[name] = model.replaced[name] = made


def _divided(weight: Weight, calibration: Calibration, name: str) -> Tensor:
    return calibration.vector(name, weight.read())


def _replace(model: TracedModel, node: Node, parts: Parts, scheme: Scheme) -> None:
    """Let what read the weight read what its integers stand for."""
    readers = list(node.users)
    with model.graph.inserting_before(readers[0]):
        arguments = (parts["q"], parts["scale"], parts.get("zero_point"), scheme.bits, 1, scheme.group)
        weight = call(model.graph, torch.ops.calque.dequantize_weight.default, *arguments)
    for reader in readers:
        if reader.target in (aten.linear.default, aten.embedding.default):
            reader.replace_input_with(node, weight)
            continue
        bias, value = (reader.args[0], reader.args[1]) if reader.target is aten.addmm.default else (None, reader.args[0])
        with model.graph.inserting_before(reader):
            product = call(model.graph, aten.linear.default, value, weight, bias)
        product.meta = dict(reader.meta)
        reader.replace_all_uses_with(product)
        model.graph.erase_node(reader)
