"""An ONNX artifact run some nodes at a time, so that the weights of those alone are in memory.

::

    graph      %1 = A(%x, w1)   %2 = B(%1, w2)   %3 = C(%2, %1, w3)
    blocks     [A, B]  reads %x, gives %1 and %2        [C]  reads %2 and %1, gives %3

The nodes of the file are cut, in their order, wherever the weights met so far reach a number of bytes; each block is a graph of
those nodes as they are, whose weights stay in the artifact's own file. Every node is in one block. What one block gives another
is handed over, so what comes out at the end is what the whole artifact computes. A product whose integers alone are more than
that is run some rows of its weight at a time, read from their place in the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from calque.memory import trim
from calque.runtime.onnxruntime_session import OnnxRuntimeSession
from calque.runtime.standard_session import LEVEL_SETTING
from calque.targets._exact import switched_off, without_rounding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.artifact import Artifact

Values = dict[str, "NDArray[np.generic]"]
# MatMulNBits: its integers, scales, zero points and bias have a row for each output; the fifth input, a reordering, has not.
BY_ROWS = {1, 2, 3, 5}


@dataclass(frozen=True)
class Block:
    """Nodes that follow each other, what they read of graph inputs and earlier blocks, and what is read of them later."""

    nodes: tuple[NodeProto, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]


class BlockSession(OnnxRuntimeSession):
    """Runs the artifact's graphs block by block, ``nbytes`` of weights at a time, each block opened for the calls it is given.

    ``exact``: no product rounds what it multiplies.
    """

    def __init__(self, artifact: Artifact, threads: int, nbytes: int, exact: bool = False) -> None:
        super().__init__(artifact, threads)
        self.nbytes = nbytes
        self.exact = exact
        self._cut: dict[str, tuple[ModelProto, list[Block]]] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> Values:
        """Return every output of ``graph`` by name."""
        return self.run_each(graph, [inputs])[0]

    def run_each(self, graph: str, calls: Sequence[Mapping[str, NDArray[np.generic]]]) -> list[Values]:
        """Return every output of ``graph`` for each of several calls; each block is opened once for all of them.

        Raises:
            ArtifactUnreadable: ONNX Runtime refuses a block, or fails while running it.
        """
        model, blocks = self._blocks(graph)
        values = [dict(inputs) for inputs in calls]
        outputs = [output.name for output in self.spec(graph).outputs]
        with self.explained(graph):
            for place, block in enumerate(blocks):
                later = {name for other in blocks[place + 1 :] for name in other.reads}.union(outputs)
                self._run_block(model, block, values)
                trim()
                for held in values:
                    for name in held.keys() - later:
                        del held[name]
        return [{name: held[name] for name in outputs} for held in values]

    def _run_block(self, model: ModelProto, block: Block, values: list[Values]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = False  # what a block needed is given back when it is closed
        folder = (self.artifact.folder / self.spec(next(iter(self.artifact.graphs))).file).parent
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(folder))
        data = _extracted(model, block, values[0]).SerializeToString()
        if self.exact:
            options.add_session_config_entry(LEVEL_SETTING, "0")
        with switched_off() if self.exact else nullcontext():
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        for held in values:
            given = {name: np.ascontiguousarray(held[name]) for name in block.reads}
            held.update(zip(block.gives, session.run(list(block.gives), given), strict=True))

    def _blocks(self, graph: str) -> tuple[ModelProto, list[Block]]:
        if graph not in self._cut:
            path = self.artifact.folder / self.spec(graph).file
            model = opened(path, self.exact)
            _divide(model.graph, self.nbytes)
            self._cut[graph] = model, cut(model.graph, self.nbytes)
        return self._cut[graph]


def opened(path: Path, exact: bool) -> ModelProto:
    """Return the graph of the file, its weights left where they are; ``exact``: without rounding."""
    model = onnx.load(path, load_external_data=False)
    if exact:
        without_rounding(model)
    return model


def cut(graph: GraphProto, nbytes: int) -> list[Block]:
    """Return the graph's nodes in blocks of at most ``nbytes`` of weights, or of one node: each node in one of them, in order."""
    sizes = {tensor.name: stored_bytes(tensor) for tensor in graph.initializer}
    groups: list[list[NodeProto]] = [[]]
    held: set[str] = set()
    for node in graph.node:
        met = {name for name in reads(node) if name in sizes}
        if groups[-1] and sum(sizes[name] for name in held | met) > nbytes:
            groups.append([])
            held = set()
        groups[-1].append(node)
        held |= met
    assert [id(node) for group in groups for node in group] == [id(node) for node in graph.node], "a node is in no block, or in two"
    outputs = {output.name for output in graph.output}
    blocks: list[Block] = []
    wanted = set(outputs)
    for group in reversed(groups):
        made = [name for node in group for name in node.output if name]
        read = list(dict.fromkeys(name for node in group for name in reads(node)))
        taken = tuple(name for name in read if name not in made and name not in sizes)
        blocks.insert(0, Block(tuple(group), taken, tuple(name for name in made if name in wanted)))
        wanted.update(taken)
    known = {value.name for value in graph.input}.union(name for block in blocks for name in block.gives)
    assert wanted <= known | sizes.keys(), f"no block gives {sorted(wanted - known)}"
    return blocks


def reads(node: NodeProto) -> Iterator[str]:
    """Yield every value of its own graph that a node reads, those that graphs inside it read too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            made = {name for other in inner.node for name in other.output} | {value.name for value in inner.input}
            made |= {tensor.name for tensor in inner.initializer}
            yield from (name for other in inner.node for name in reads(other) if name not in made)


def stored_bytes(tensor: TensorProto) -> int:
    """Return the bytes of a weight, wherever they lie."""
    bits: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    count: int = math.prod(tensor.dims)
    return count * bits // 8


def _extracted(model: ModelProto, block: Block, values: Mapping[str, NDArray[np.generic]]) -> ModelProto:
    """Return a model of the block alone; what it reads has the types of ``values``, what it gives those that the runtime finds."""
    needed = {name for node in block.nodes for name in reads(node)}
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), None) for name in block.reads]
    graph = helper.make_graph(
        block.nodes,
        "block",
        inputs,
        [ValueInfoProto(name=name) for name in block.gives],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions)


def _divide(graph: GraphProto, nbytes: int) -> None:
    """Let products by more than ``nbytes`` of integers be several by some rows each, their results beside each other."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        weight = tensors.get(node.input[1]) if node.op_type == "MatMulNBits" else None
        parts = _parts(node, tensors, nbytes) if weight is not None and stored_bytes(weight) > nbytes else []
        if len(parts) < 2:
            nodes.append(node)
            continue
        for part, made in parts:
            graph.initializer.extend(made)
            nodes.append(part)
        nodes.append(helper.make_node("Concat", [part.output[0] for part, _ in parts], list(node.output), axis=-1))
    del graph.node[:]
    graph.node.extend(nodes)


def _parts(node: NodeProto, tensors: Mapping[str, TensorProto], nbytes: int) -> list[tuple[NodeProto, list[TensorProto]]]:
    """Return the product as several by some rows of its weight; none where what it reads cannot be cut."""
    held = {place: tensors.get(name) for place, name in enumerate(node.input) if name and place > 0}
    if held.keys() - BY_ROWS or any(tensor is None or not tensor.external_data for tensor in held.values()):
        return []
    rows = next(attribute.i for attribute in node.attribute if attribute.name == "N")
    row = stored_bytes(tensors[node.input[1]]) // rows
    step, parts = max(1, nbytes // row), []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        made = {place: _rows(tensor, rows, start, stop) for place, tensor in held.items() if tensor is not None}
        part = NodeProto()
        part.CopyFrom(node)
        part.output[0] = f"{node.output[0]}.rows{start}"
        for place, tensor in made.items():
            part.input[place] = tensor.name
        for attribute in part.attribute:
            if attribute.name == "N":
                attribute.i = stop - start
        parts.append((part, list(made.values())))
    return parts


def _rows(tensor: TensorProto, rows: int, start: int, stop: int) -> TensorProto:
    """Return some rows of a weight that lies in a file: the same file, further on and shorter."""
    place: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
    row = stored_bytes(tensor) // rows
    dims = [stop - start, *tensor.dims[1:]] if tensor.dims[0] == rows else [(stop - start) * math.prod(tensor.dims) // rows]
    part = TensorProto(name=f"{tensor.name}.rows{start}", data_type=tensor.data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    found = {"location": place["location"], "offset": str(int(place.get("offset", 0)) + start * row), "length": str((stop - start) * row)}
    for key, value in found.items():
        part.external_data.add(key=key, value=value)
    return part
