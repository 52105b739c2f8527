"""Rows of tokens on their way through a traced graph, a block at a time, to see what its products with weights read.

The graph's nodes are cut into consecutive blocks: what comes before the layers, each layer, what comes after them. A block's
weights are read when the rows reach it and dropped when all of them have passed; of a row only those values are kept that later
blocks need. So a model is measured with one block's weights in memory, whatever its size.

Rows have no padding and no past: the attention mask is all ones, positions count from 0, caches are empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from calque.artifact import NUM_LOGITS_TO_KEEP
from calque.errors import Unsupported
from calque.patterns import aten
from calque.products import PRODUCTS

if TYPE_CHECKING:
    from calque.artifact import TensorSpec
    from calque.traced import TracedModel

# What leaves the channels of a value as they are.
RESHAPES = (aten.reshape.default, aten.view.default, aten.clone.default, aten.alias.default)

Values = dict[Node, Any]


@dataclass(frozen=True)
class Product:
    """One product of a value with the parameter called ``weight``, which lies [in, out] if ``inputs_first``, else [out, in]."""

    weight: str
    node: Node
    parameter: Node
    value: Node
    inputs_first: bool

    @property
    def read(self) -> Node:
        """The value as it was before it was reshaped for this product: products that share it see the same channels."""
        return unshaped(self.value)


@dataclass(frozen=True)
class Block:
    """Consecutive nodes; ``keeps`` are those that later blocks read, ``parameters`` the weights and constants that these read."""

    nodes: tuple[Node, ...]
    products: tuple[Product, ...]
    parameters: tuple[Node, ...]
    keeps: frozenset[Node]


def unshaped(value: Node) -> Node:
    """Return what a value was before reshapes that leave its last axis whole."""
    while value.target in RESHAPES:
        before: Any = value.args[0]
        if before.meta["val"].shape[-1:] != value.meta["val"].shape[-1:]:
            break
        value = before
    return value


def observe(model: TracedModel, rows: Sequence[Sequence[int]], observer: Callable[[str, Tensor], None]) -> None:
    """Every product with a weight was shown to ``observer``: the weight's name, and what the product reads of a row, [..., in].

    Of tied weights the name is the first. Rows come one after the other, block after block: a product sees all rows before
    products of later blocks see the first.

    Raises:
        Unsupported: the model has inputs that no text gives.
    """
    stream = Stream(model, rows, products_of(model))
    for block in stream.blocks:
        stream.pass_through(block, stream.read(block), observer)


def products_of(model: TracedModel) -> list[Product]:
    """Return every product of a value with a parameter that is a matrix, in order."""
    names, first = {}, dict[int, str]()
    for name, node in model.parameters().items():
        names[node] = first.setdefault(id(model.weights[name]), name)
    found = []
    for node in model.graph.nodes:
        places = PRODUCTS.get(node.target)
        if places is None or node.args[places.weight] not in names or node.args[places.value] in names:
            continue
        parameter, value = (node.args[place] for place in places)
        if len(parameter.meta["val"].shape) == 2:
            found.append(Product(names[parameter], node, parameter, value, node.target is not aten.linear.default))
    return found


class Stream:
    """Rows of tokens, each as far into the graph as the blocks that were run; ``blocks`` are to be passed in order."""

    def __init__(self, model: TracedModel, rows: Sequence[Sequence[int]], products: Sequence[Product]) -> None:
        self.model = model
        self.blocks = cut(model, products)
        self._interpreter = Interpreter(model.module, garbage_collect_values=False)
        self._names = {node: name for name, node in model.parameters().items()} | model.constants()
        self._rows = [_inputs(model, row) for row in rows]

    def read(self, block: Block) -> Values:
        """Return the weights of a block, read now; the caller may replace some, and drops them when the block is passed."""
        read: dict[int, Tensor] = {}
        values: Values = {}
        for node in block.parameters:
            name = self._names[node]
            if name not in self.model.weights:
                values[node] = self.model.constant(name)
                continue
            weight = self.model.weights[name]
            if id(weight) not in read:
                read[id(weight)] = weight.read()
            values[node] = read[id(weight)]
        return values

    def show(self, block: Block, weights: Values, product: Product, seen: Callable[[Tensor], None]) -> None:
        """Show what one product of the block reads of every row; the rows stay before the block."""
        wanted = _above([product.value], block.nodes)
        for row in self._rows:
            seen(self._run([node for node in block.nodes if node in wanted], {**weights, **row})[product.value])

    def pass_through(self, block: Block, weights: Values, observer: Callable[[str, Tensor], None] | None = None) -> None:
        """Leave the rows behind the block, having shown what each of its products reads."""
        for place, row in enumerate(self._rows):
            values = self._run(block.nodes, {**weights, **row})
            for product in block.products if observer else ():
                assert observer is not None
                observer(product.weight, values[product.value])
            inputs = {node: value for node, value in row.items() if node.op == "placeholder" or node in block.keeps}
            self._rows[place] = inputs | {node: values[node] for node in block.keeps if node in values}

    def _run(self, nodes: Iterable[Node], values: Values) -> Values:
        self._interpreter.env = values
        with torch.no_grad():
            for node in nodes:
                if node not in values:
                    values[node] = self._interpreter.run_node(node)
        self._interpreter.env = {}
        return values


def cut(model: TracedModel, products: Sequence[Product]) -> list[Block]:
    """Return the nodes that what the products read comes from, in consecutive blocks; a layer of the model is one of them."""
    wanted = _above([product.value for product in products], model.graph.nodes)
    parts: list[list[Node]] = []
    current = None
    for node in model.graph.nodes:
        if node.op == "placeholder" or (node not in wanted and node.target not in PRODUCTS):
            continue
        layer = _layer(node)
        if not parts or (layer is not None and layer != current):
            parts.append([])
            current = layer
        parts[-1].append(node)
    inputs = set(model.placeholders().values())
    blocks: list[Block] = []
    later: set[Node] = set()
    for part in reversed(parts):
        inside = set(part)
        here = tuple(product for product in products if product.node in inside)
        nodes = tuple(node for node in part if node in wanted)
        sources = {source for node in nodes for source in node.all_input_nodes} | {product.value for product in here}
        weights = tuple(node for node in model.graph.nodes if node.op == "placeholder" and node in sources - inputs)
        read_here = {product.parameter for product in here} - set(weights)
        blocks.append(Block(nodes, here, (*weights, *sorted(read_here, key=lambda node: node.name)), frozenset(later)))
        later = (later - set(nodes)) | {source for source in sources if source.op != "placeholder" and source not in inside}
    return blocks[::-1]


def _layer(node: Node) -> str | None:
    """Return the outermost numbered module that a node comes from, nothing outside of those; None where no module is known."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if not any(stack):
        return None
    found = (re.match(r"(.*?\.\d+)(\.|$)", path) for path in stack)
    return next((match[1] for match in found if match), "")


def _above(roots: Iterable[Node], within: Iterable[Node]) -> set[Node]:
    """Return the nodes, of those given, that the roots are or come from."""
    allowed, found, stack = set(within), set[Node](), list(roots)
    while stack:
        node = stack.pop()
        if node in allowed and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _inputs(model: TracedModel, row: Sequence[int]) -> Values:
    """Return what a row of tokens alone, without a past, gives to each input of the graph."""
    return {node: _input(spec, row) for spec, node in zip(model.inputs, model.placeholders().values(), strict=True)}


def _input(spec: TensorSpec, row: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(row)], dtype=torch.int64)
    known: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "attention_mask": lambda: torch.ones_like(ids),
        "position_ids": lambda: torch.arange(ids.shape[1])[None],
        "token_type_ids": lambda: torch.zeros_like(ids),
        NUM_LOGITS_TO_KEEP: lambda: torch.tensor(ids.shape[1]),
    }
    if spec.name in known:
        return known[spec.name]()
    if "past_sequence_length" not in spec.shape:
        raise Unsupported(f"calibration knows no value for the input {spec.name}", fix="quantize without `calibration`")
    sizes = [{"batch_size": 1, "past_sequence_length": 0}.get(size, size) for size in spec.shape]  # type: ignore[arg-type]
    return torch.zeros([int(size) for size in sizes], dtype=getattr(torch, spec.dtype))


def together(products: Iterable[Product]) -> list[list[Product]]:
    """Return the products that read the same value together, in order."""
    groups: dict[Node, list[Product]] = {}
    for product in products:
        groups.setdefault(product.read, []).append(product)
    return list(groups.values())


@dataclass
class Moments:
    """What is known of the vectors that a product reads: their number, their mean absolute values, their second moments [in, in]."""

    count: int = 0
    absolute: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, value: Tensor) -> None:
        """Count the vectors of a value [..., in] as well."""
        vectors = value.reshape(-1, value.shape[-1]).to(torch.float32)
        count = self.count + vectors.shape[0]
        # As running means, so that what many vectors add up to stays exact in float32.
        self.absolute = self.absolute * (self.count / count) + vectors.abs().sum(0) / count
        self.second = self.second * (self.count / count) + vectors.t() @ vectors / count
        self.count = count
