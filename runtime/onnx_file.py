"""What an ONNX file says of its graph, read without the onnx package and without its weights.

Source: onnx.proto of onnx@1.20 for the numbers of the fields.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calque.errors import ArtifactUnreadable
from calque.runtime.wire import fields, parts, text, varints

if TYPE_CHECKING:
    from calque.states import StateSpec

# Bits of an element by TensorProto.DataType; what is not here are strings and complex numbers, which no weight is.
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16}
BITS |= {kind: 8 for kind in (17, 18, 19, 20, 24)} | {kind: 4 for kind in (21, 22, 23)} | {25: 2, 26: 2}
# Operators that read some rows of their first input, the table, and never all of it.
LOOKUPS = ("Gather", "GatherBlockQuantized")


@dataclass(frozen=True)
class Node:
    """One node: its operator, the names it reads and gives, and whether it runs graphs of its own."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    subgraphs: bool


@dataclass(frozen=True)
class OnnxFile:
    """The main graph of a file: bytes of each weight by name, and every node."""

    weights: dict[str, int]
    nodes: tuple[Node, ...]

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Return what the file holds; weights inside it are stepped over.

        Raises:
            ArtifactUnreadable: it cannot be read, or is no ONNX model.
        """
        try:
            with path.open("rb") as file:  # the mapping outlives it, and ends with the last view of it
                return cls._of(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        except (OSError, ValueError, IndexError) as error:  # mmap refuses an empty file with a ValueError
            raise ArtifactUnreadable(f"{path} cannot be read as an ONNX model: {error}", fix="convert the model again") from error

    @classmethod
    def _of(cls, data: memoryview) -> OnnxFile:
        weights: dict[str, int] = {}
        nodes = []
        for graph in parts(data, 7):
            weights |= dict(_weight(part) for part in parts(graph, 5))
            nodes += [_node(part) for part in parts(graph, 1)]
        if not nodes:
            raise ValueError("it holds no graph")
        return cls(weights, tuple(nodes))

    def bytes_per_call(self) -> int:
        """Return the bytes of weights that each call reads; tables of which it looks up rows do not count."""
        looked_up: dict[str, bool] = {}
        for node in self.nodes:
            for place, name in enumerate(node.inputs):
                looked_up[name] = looked_up.get(name, True) and place == 0 and node.operator in LOOKUPS
        return sum(size for name, size in self.weights.items() if not looked_up.get(name, False))

    def shares_buffers(self, states: Sequence[StateSpec]) -> bool:
        """Return whether a state's input and output may be one buffer longer than what it holds.

        So it is where GroupQueryAttention alone reads every state and gives the one that follows: it takes lengths from the
        attention mask, and adds new slots in place where both are the same memory. A graph that reads the length of the cache
        from its shape would be told a wrong one.
        Source: GQAAttentionBase of onnxruntime@1.31, ``past_present_share_buffer``.
        """
        follows = {state.input: state.output for state in states}
        if not follows or any(node.subgraphs for node in self.nodes):
            return False
        readers = [node for node in self.nodes if follows.keys() & set(node.inputs)]
        wrong = (node for node in readers if not _grows_in_place(node, follows))
        return next(wrong, None) is None and follows.keys() == {name for node in readers for name in node.inputs[3:5]}


def _grows_in_place(node: Node, follows: dict[str, str]) -> bool:
    if node.operator != "GroupQueryAttention" or len(node.inputs) < 5:
        return False
    key, value = node.inputs[3:5]
    others = (*node.inputs[:3], *node.inputs[5:])
    return (follows.get(key), follows.get(value)) == node.outputs[1:3] and not follows.keys() & set(others)


def _weight(tensor: memoryview) -> tuple[str, int]:
    dims: list[int] = []
    name, kind = "", 0
    for number, value in fields(tensor):
        if number == 1:
            dims += [value] if isinstance(value, int) else varints(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = text(value)
    return name, (math.prod(dims) * BITS.get(kind, 0) + 7) // 8


def _node(node: memoryview) -> Node:
    names: dict[int, list[str]] = {1: [], 2: [], 4: []}
    subgraphs = False
    for number, value in fields(node):
        if number in names:
            names[number].append(text(value))
        elif number == 5 and not isinstance(value, int):
            subgraphs |= any(field in (6, 11) for field, _ in fields(value))
    return Node("".join(names[4]), tuple(names[1]), tuple(names[2]), subgraphs)
