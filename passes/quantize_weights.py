"""Stores the weights of linear layers and embeddings as integers of 4 or 8 bits, or in float8_e4m3fn, and how they become numbers again.

::

    before  linear(%x, %w, %b)                        %w float32 [out, in]
            embedding(%table, %ids)                   the head's weight as well, where they are tied
    after   linear(%x, calque.dequantize_weight(%q, %scale, %zero_point, bits, 1, group), %b)
            embedding(calque.dequantize_weight(%q, …), %ids)

    before  matmul(%x, transpose(%w, 1, 2))           %w float32 [experts, out, in]; or [experts, in, out], as it is
    after   matmul(%x, transpose(reshape(calque.dequantize_weight(%q, …), [experts, out, in]), 1, 2))     %q [experts · out, in]

    left    weights of other operators (convolutions), rows that no group of 16 or more divides, what an override keeps; the
            product that chooses experts, which is small: what it rounds would send tokens elsewhere
    kept    integers of a quantized checkpoint that have the bits asked for, in groups of their own

It goes first: parameters then have the names of the checkpoint, and what joins layers joins their integers. Activations stay as
they are. The integers are those of every target. Of the format e4m3 %q is float8_e4m3fn, with one scale an output.

Source: round to nearest with a search over narrower ranges; AWQ, arXiv 2306.00978; GPTQ, arXiv 2210.17323; e4m3, arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor
from torch.fx import Node

from calque.calibrated import Awq, Calibration, Gptq
from calque.calibration import products_of
from calque.choices import AS_ASKED
from calque.errors import UsageError
from calque.integers_file import IntegersFile
from calque.passes import Rewrites
from calque.patterns import aten
from calque.products import Reading, products_behind, readings
from calque.quantization import SHORTEST_GROUP, Format, Scheme, round_blocks
from calque.quantized_weight import Part, QuantizedWeight
from calque.stored_integers import KEPT, Dequantized, KeptWeight, anew
from calque.traced import call, user_nodes
from calque.weights import Derived, Weight

if TYPE_CHECKING:
    from calque.traced import TracedModel

Storage = Literal["keep", "int4", "int8", "fp8"]
BITS: dict[str, Literal[4, 8]] = {"int4": 4, "int8": 8, "fp8": 8}
# What `auto` is where there is text to measure the model on.
CALIBRATED: Literal["awq", "gptq"] = "gptq"

# The parameters that are one weight: its name, and the node it has by that name.
Owners = list[tuple[str, Node]]
Parts = dict[Part, Node]
Planned = tuple[Owners, Reading, Scheme]


@dataclass(frozen=True)
class QuantizeWeights:
    """``bits`` and ``group`` (0: one scale an output) of linear layers; ``symmetric``: no zero points.

    ``format``: integers, or e4m3, which has 8 bits, one scale an output and no zero points whatever is said of integers.

    ``search``: narrower ranges are tried as well. ``embedding``, ``head``: what tables and the last product are stored as; where
    both are one weight, ``head`` says. ``router``: products that choose experts. ``overrides``: what the weights are stored as
    whose names fit a pattern, the first that does. ``method``: ``nearest`` rounds to nearest; ``awq`` and ``gptq`` measure the
    model on text first. ``auto`` is nearest at 8 bits or without such text, else gptq: at int4 in groups of 32 the built-in model's
    perplexity grows by 0.48 % with gptq, 0.99 % with awq, 0.96 % with nearest (benchmarks/quantization/methods.md). Tables, and
    weights that several products read, are rounded to nearest. ``stored``: which integers of a quantized checkpoint are kept as
    they are; others are dequantized and quantized anew.
    """

    bits: Literal[4, 8] = 4
    group: int = 32
    symmetric: bool = True
    search: bool = True
    embedding: Storage = "int8"
    head: Storage = "int8"
    router: Storage = "keep"
    overrides: dict[str, Storage] = field(default_factory=dict)
    method: Literal["auto", "nearest", "awq", "gptq"] = "auto"
    stored: Literal["any", "symmetric", "none"] = "any"
    format: Format = "integers"

    after: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse groups that no runtime has kernels for, and e4m3 in 4 bits."""
        if self.format == "e4m3" and self.bits != 8:
            raise ValueError(f"format: e4m3 has 8 bits; found bits: {self.bits}")
        if self.group and (self.group not in (16, 32, 64, 128, 256)):
            raise ValueError(f"group: must be 16, 32, 64, 128, 256, or 0 for one scale an output; found {self.group}")

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per weight.

        Raises:
            UsageError: a calibrated method without a text to calibrate on.
        """
        if self.method in ("awq", "gptq") and not model.samples:
            raise UsageError(f"{self.method} measures the model on a text, and there is none", fix="--calibration FILE, or method: nearest")
        planned: list[Planned] = []
        skipped = []
        outputs: Any = model.output_node().args[0]
        heads = products_behind([node for node, spec in zip(outputs, model.outputs, strict=True) if spec.name == "logits"])
        routers = products_behind(user_nodes(model.graph.nodes, aten.topk.default))
        for owners in _owners(model):
            read = _reading(owners)
            found = read if isinstance(read, str) else self._scheme(model, owners, read, heads, routers)
            if isinstance(read, str) or isinstance(found, str):
                skipped.append((owners[0][0], str(found)))
            else:
                planned.append((owners, read, found))
        calibration, measured = self._calibration(model, planned)
        file = IntegersFile(model.scratch)
        for owners, read, scheme in planned:
            (name, weight) = owners[0]
            stored = model.weights[name]
            laid = read.rows(_as_stored(stored))
            made = KeptWeight.of(laid, file) if _is_kept(laid, scheme) else QuantizedWeight.nearest(laid, scheme, file)
            if calibration and weight in measured:
                made = QuantizedWeight(laid, scheme, partial(calibration.quantized, measured[weight]), file=file)
            parts = {part: model.add_parameter(f"{name}.{part}", held, like=weight) for part, held in made.parts().items()}
            for owner, node in owners:
                _replace(model, node, parts, scheme, read)
                model.replaced[owner] = read.restored(made.dequantized(), stored.shape)
                if owner in model.quantized:
                    model.quantized[owner] = (model.quantized[owner][0], KEPT if isinstance(made, KeptWeight) else anew(scheme))
                if read.experts == 1 and scheme.format == "integers":  # numbers are multiplied as numbers
                    model.rounding.setdefault(owner, partial(round_blocks, block=scheme.block(read.columns(stored.shape))))
        if calibration:
            _divide(model, calibration)
        model.drop_unused_parameters()
        return Rewrites(len(planned), (*skipped, *(calibration.left if calibration else ())))

    def _calibration(self, model: TracedModel, planned: list[Planned]) -> tuple[Calibration | None, dict[Node, str]]:
        """Return what gives calibrated integers, and the names it knows weights by that one product alone reads."""
        # Of 8 bits no method is better than rounding to nearest, and int8 has the same integers whatever activations are.
        method = CALIBRATED if self.method == "auto" and self.bits == 4 and model.samples else self.method
        if method not in ("awq", "gptq"):
            return None, {}
        alone = [(owners[0], read, scheme) for owners, read, scheme in planned if len(owners) == 1 and len(owners[0][1].users) == 1]
        schemes = {node: scheme for (name, node), read, scheme in alone if not _is_kept(read.rows(_as_stored(model.weights[name])), scheme)}
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

    def _scheme(self, model: TracedModel, owners: Owners, read: Reading, heads: set[Node], routers: set[Node]) -> Scheme | str:
        """Return how the weight is quantized, or why it is not."""
        storage = self._storage(owners, read, heads, routers)
        if storage == "keep":
            return AS_ASKED
        weight, asked = model.weights[owners[0][0]], self._asked(storage)
        if kept := self._kept(read.rows(_as_stored(weight)), asked, owners):
            return kept
        columns = read.columns(weight.shape)
        # A group of a table is read as the product reads it: per channel means a whole row in both.
        return asked.fitted(columns) or f"its rows of {columns} divide into no group of {SHORTEST_GROUP} or more"

    def _asked(self, storage: Storage) -> Scheme:
        """Return how a weight is quantized that is stored so, whatever its size."""
        if storage == "fp8":
            return Scheme(8, 0, search=False, format="e4m3")
        return Scheme(BITS[storage], self.group, self.symmetric, self.search and BITS[storage] == 4)

    def _kept(self, weight: Weight, asked: Scheme, owners: Owners) -> Scheme | None:
        """Return how the checkpoint itself holds the weight as integers, where they are those asked for or, unless named, narrower."""
        scheme = weight.scheme if isinstance(weight, Dequantized) else None
        if scheme is None or self.stored == "none" or (self.stored == "symmetric" and not scheme.symmetric):
            return None
        if scheme.format != asked.format:
            return None
        # A head in 4 bits would only become larger in 8.
        return scheme if scheme.bits == asked.bits or (scheme.bits == self.bits and not self._override(owners)) else None

    def _override(self, owners: Owners) -> Storage | None:
        fitting = (storage for pattern, storage in self.overrides.items() if any(fnmatchcase(name, pattern) for name, _ in owners))
        return next(fitting, None)

    def _storage(self, owners: Owners, read: Reading, heads: set[Node], routers: set[Node]) -> Storage:
        if storage := self._override(owners):
            return storage
        users = {user for _, node in owners for user in node.users}
        if users & heads:
            return self.head
        if users & routers:
            return self.router
        products: Storage = "fp8" if self.format == "e4m3" else "int4" if self.bits == 4 else "int8"
        return self.embedding if read.kind == "table" else products


def stored_as(model: TracedModel) -> dict[str, Storage]:
    """Return what each weight is stored as that the pass quantized, by the name that it had; tied ones by the first of theirs."""
    names = {node: name for name, node in model.parameters().items()}
    found: dict[str, Storage] = {}
    for node in user_nodes(model.graph.nodes, torch.ops.calque.dequantize_weight.default):
        q: Any = node.args[0]
        integers: Storage = "int4" if node.args[3] == 4 else "int8"
        found[names[q].removesuffix(".q")] = "fp8" if q.meta["val"].dtype == torch.float8_e4m3fn else integers
    return found


def _owners(model: TracedModel) -> list[Owners]:
    """Return the parameters that are float matrices, or several beside each other, tied ones together, each with its name."""
    found: dict[int, Owners] = {}
    for name, node in model.parameters().items():
        if node.users and len(model.weights[name].shape) in (2, 3) and node.meta["val"].is_floating_point():
            found.setdefault(id(model.weights[name]), []).append((name, node))
    return list(found.values())


def _reading(owners: Owners) -> Reading | str:
    """Return how the weight is read, as a product where it is a table too; or why it is not quantized."""
    found: dict[Reading, None] = {}
    for _, node in owners:
        for user, read in readings(node):
            if read is None:
                return f"read by {user.target}, which is no linear layer and no embedding"
            found[read] = None
    products = [read for read in found if read.kind != "table"]
    if len(products) > 1 or (products and products[0].inputs_first and len(found) > 1):
        return "read both as [in, out] and as [out, in]"
    return products[0] if products else next(iter(found))


def _as_stored(weight: Weight) -> Weight:
    """Return the weight in the type that it is stored in: to integers it goes from there."""
    return weight.sources[0] if isinstance(weight, Derived) and weight.operation == "cast(float32)" else weight


def _is_kept(laid: Weight, scheme: Scheme) -> TypeGuard[Dequantized]:
    """Return whether the scheme is the one in which the checkpoint itself holds the weight."""
    return isinstance(laid, Dequantized) and laid.scheme is scheme


def _divide(model: TracedModel, calibration: Calibration) -> None:
    """Let the vectors that take scales back be what the calibration makes of them."""
    for name in calibration.divided:
        weight = model.weights[name]
        read = partial(_divided, weight, calibration, name)
        made = Derived((), "divide", read, "float32", tuple(weight.shape), moved=False)
        model.weights.entries[name] = model.replaced[name] = made


def _divided(weight: Weight, calibration: Calibration, name: str) -> Tensor:
    return calibration.vector(name, weight.read())


def _replace(model: TracedModel, node: Node, parts: Parts, scheme: Scheme, read: Reading) -> None:
    """Let what read the weight read what its integers stand for."""
    readers = list(node.users)
    shape = tuple(node.meta["val"].shape)
    alone = len(shape) == 2 and read.experts == 1
    # Not of its users: what a pass put there is the last of these, wherever it stands.
    first = next(reader for reader in model.graph.nodes if reader in node.users)
    with model.graph.inserting_before(first):
        arguments = (parts["q"], parts["scale"], parts.get("zero_point"), scheme.bits, 1, scheme.group)
        weight = call(model.graph, torch.ops.calque.dequantize_weight.default, *arguments)
        if not alone:
            weight = _laid(model, weight, read, shape)
    for reader in readers:
        if not (alone and read.inputs_first):
            reader.replace_input_with(node, weight)
            continue
        bias, value = (reader.args[0], reader.args[1]) if reader.target is aten.addmm.default else (None, reader.args[0])
        with model.graph.inserting_before(reader):
            product = call(model.graph, aten.linear.default, value, weight, bias)
        product.meta = dict(reader.meta)
        reader.replace_all_uses_with(product)
        model.graph.erase_node(reader)


def _laid(model: TracedModel, rows: Node, read: Reading, shape: tuple[int, ...]) -> Node:
    """Return the rows of several matrices, [E · out, in], laid as the parameter of that shape was."""
    columns = read.columns(shape)
    if read.inputs_first:
        apart = call(model.graph, aten.reshape.default, rows, [read.experts, -1, columns])
        rows = call(model.graph, aten.transpose.int, apart, 1, 2)
    if tuple(rows.meta["val"].shape) == shape:
        return rows
    return call(model.graph, aten.reshape.default, rows, list(shape))
