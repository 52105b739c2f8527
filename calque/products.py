"""How a graph reads a parameter: as a table, as the matrix of a product, or as the matrices of experts beside each other.

::

    table          embedding(%w, ids)
    outputs first  linear(x, %w)                      experts: matmul(x, transpose(%w, 1, 2))          %w [E, out, in]
    inputs first   matmul(x, %w)  addmm(b, x, %w)     experts: matmul(x, %w)                           %w [E, in, out]

The matrices of experts may be taken out of the parameter first: a reshape to [E, ·, ·], a slice of the first axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.fx import Node

from calque.patterns import aten
from calque.quantization import Scheme
from calque.weights import Derived, Weight, torch_dtype_name


class Places(NamedTuple):
    """Where a product has its weight among its arguments, and the value that it multiplies."""

    weight: int
    value: int


PRODUCTS: dict[Any, Places] = {
    aten.linear.default: Places(1, 0),
    aten.addmm.default: Places(2, 1),
    aten.mm.default: Places(1, 0),
    aten.matmul.default: Places(1, 0),
    aten.bmm.default: Places(1, 0),
}


@dataclass(frozen=True)
class Reading:
    """``experts``: how many matrices lie beside each other along the first axis; a plain matrix is one."""

    kind: Literal["table", "outputs first", "inputs first"]
    experts: int = 1

    @property
    def inputs_first(self) -> bool:
        """Whether a matrix lies [in, out]."""
        return self.kind == "inputs first"

    def rows(self, weight: Weight) -> Weight:
        """Return the weight as [E · out, in]."""
        columns = self.columns(weight.shape)

        def lay(tensor: Tensor) -> Tensor:
            apart = tensor.reshape(self.experts, -1, tensor.shape[-1])
            return (apart.transpose(1, 2) if self.inputs_first else apart).reshape(-1, columns)

        return self._moved(weight, lay, (math.prod(weight.shape) // columns, columns))

    def restored(self, rows: Weight, shape: tuple[int, ...]) -> Weight:
        """Return what `rows` made, laid as the parameter of ``shape`` is."""
        columns = self.columns(shape)

        def lay(tensor: Tensor) -> Tensor:
            apart = tensor.reshape(self.experts, -1, columns)
            return (apart.transpose(1, 2) if self.inputs_first else apart).reshape(shape)

        return self._moved(rows, lay, shape)

    def columns(self, shape: tuple[int, ...]) -> int:
        """Return how many inputs a row of the matrices has in a parameter of ``shape``."""
        return math.prod(shape[:-1]) // self.experts if self.inputs_first else shape[-1]

    def _moved(self, weight: Weight, lay: Any, shape: tuple[int, ...]) -> Weight:
        if weight.shape == shape and not self.inputs_first:
            return weight
        return Derived((weight,), "transpose" if self.inputs_first else "reshape", lay, torch_dtype_name(weight), shape)


def readings(node: Node) -> Iterator[tuple[Node, Reading | None]]:
    """Yield every node that reads a parameter, and how; None where that is no table and no product."""
    for user in node.users:
        if user.target is aten.embedding.default:
            yield user, Reading("table") if user.args[0] is node else None
        elif node.meta["val"].dim() == 2 and user.target in PRODUCTS:
            yield user, _of_matrix(user, node)
        else:
            yield from _of_experts(user, node)


def _multiplies(user: Node, weight: Node) -> bool:
    """Return whether a node is a product with the weight in its place, and there alone."""
    places = PRODUCTS.get(user.target)
    return places is not None and user.args[places.weight] is weight and sum(argument is weight for argument in user.args) == 1


def reads_rows(user: Node, weight: Node) -> bool:
    """Return whether a node is a product with a weight that lies [out, in], or a lookup in it, and nothing else."""
    if user.target is aten.embedding.default:
        return user.args[0] is weight
    return user.target is aten.linear.default and _multiplies(user, weight)


def _of_matrix(user: Node, weight: Node) -> Reading | None:
    if not _multiplies(user, weight):
        return None
    return Reading("outputs first" if user.target is aten.linear.default else "inputs first")


def _of_experts(user: Node, weight: Node) -> Iterator[tuple[Node, Reading | None]]:
    """Yield how a node reads matrices that lie beside each other; those that it only takes out are read by what follows."""
    shape = weight.meta["val"].shape
    if _takes_out(user, weight):
        for reader in user.users:
            for read, found in _of_experts(reader, user):
                # Of a slice there are fewer matrices than the parameter has.
                whole = int(shape[0]) if len(shape) == 3 else int(user.meta["val"].shape[0])
                yield read, None if found is None else Reading(found.kind, whole)
    elif len(shape) == 3 and _multiplies(user, weight):
        yield user, Reading("inputs first", int(shape[0]))
    elif len(shape) == 3 and _swaps(user) and user.users and all(_multiplies(reader, user) for reader in user.users):
        for reader in user.users:
            yield reader, Reading("outputs first", int(shape[0]))
    else:
        yield user, None


def _takes_out(user: Node, weight: Node) -> bool:
    """Return whether a node takes whole matrices of a parameter, [E, ·, ·], and nothing else."""
    value, made = weight.meta["val"], user.meta.get("val")
    if weight.op != "placeholder" or not isinstance(made, Tensor) or made.dim() != 3:
        return False
    if user.target is aten.slice.Tensor:
        return bool(user.args[1] == 0 and made.shape[1:] == value.shape[1:])
    return user.target is aten.reshape.default and value.dim() == 2 and bool(made.shape[2] == value.shape[1])


def _swaps(user: Node) -> bool:
    """Return whether a node swaps the last two of three axes."""
    if user.target is aten.transpose.int:
        return {int(axis) % 3 for axis in user.args[1:]} == {1, 2}  # type: ignore[arg-type]
    return user.target is aten.permute.default and list(user.args[1]) == [0, 2, 1]  # type: ignore[arg-type]


def products_behind(stack: list[Node]) -> set[Node]:
    """Return the products that values come from without another product between them."""
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


def block_of(weight: Node) -> int:
    """Return how many neighbours of a dequantized weight share a scale; where a row has one alone, as many as kernels round together."""
    arguments: Any = weight.args
    return Scheme(arguments[3], arguments[5]).block(int(arguments[0].meta["val"].shape[1]))
