"""The same ONNX file run without rounding activations: what proves its integers and its graph apart from how products round.

::

    in the file                                              run in its place
    MatMulNBits(x, …, accuracy_level=4), QMoE as well        MatMulNBits(x, …)
    DequantizeLinear(q, …) · MatMul, which ONNX Runtime joins to MatMulNBits: at the level that rounds nothing
    DynamicQuantizeMatMul(x, q, scale, , bias)               Add(MatMul(x, DequantizeLinear(q, scale)), bias)
    MatMulInteger(DynamicQuantizeLinear(x), q) · steps       MatMul(x, q) · 1
    DequantizeLinear(QuantizeLinear(x))                      x

Without rounding a file computes in float32 with the same weights, and agrees with the eager model as closely as a float32
artifact does. Its weights are read from the artifact's own files. QMoE of 8 bits rounds at every level; it takes another way where
ONNX Runtime's own switch, an environment variable, is off while the session is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.runtime.standard_session import StandardSession

if TYPE_CHECKING:
    import onnx

LEVEL, ROUNDED = "accuracy_level", 4
# The operators that have it.
LEVELLED = ("MatMulNBits", "QMoE")
# Source: onnxruntime/contrib_ops/cpu/moe/moe_quantization_cpu.cc@1.31.
SWITCH = "ORT_QMOE_CPU_QNBIT_GEMM"


class ExactSession(StandardSession):
    """Runs an artifact's graphs with everything taken out that rounds activations."""

    def opened(self, graph: str) -> Any:
        """Return ONNX Runtime's session of ``graph``, whose experts round nothing either."""
        with switched_off():
            return super().opened(graph)

    def model(self, path: Path) -> str | bytes:
        """Return the bytes of the graph without rounding."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        without_rounding(model)
        return bytes(model.SerializeToString())


def without_rounding(model: onnx.ModelProto) -> None:
    """The model rounds no activations."""
    graph = model.graph
    made = _Exact({name: node for node in graph.node for name in node.output})
    nodes = [new for node in graph.node for new in made.nodes(node)]
    for node in nodes:
        node.input[:] = [made.renamed.get(name, name) for name in node.input]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(made.constants.values())


class _Exact:
    """Node by node, in order, what computes without rounding; ``renamed``: values that others take the place of."""

    def __init__(self, makers: dict[str, onnx.NodeProto]) -> None:
        self.makers = makers
        self.renamed: dict[str, str] = {}
        self.constants: dict[str, onnx.TensorProto] = {}

    def nodes(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that stand for one of the file's."""
        if node.op_type in LEVELLED:
            kept = [attribute for attribute in node.attribute if attribute.name != LEVEL]
            del node.attribute[:]
            node.attribute.extend(kept)
        elif node.op_type == "DynamicQuantizeMatMul":
            return self._product(node)
        elif node.op_type == "DynamicQuantizeLinear":
            self._rename(node.output[0], node.input[0])
            self._rename(node.output[1], self._one())
            return []
        elif node.op_type == "MatMulInteger" and self._made_by(node.input[0], "DynamicQuantizeLinear"):
            return self._dequantized(node.input[1], self._one(), node.output[0], node.input[0])
        elif node.op_type == "DequantizeLinear":
            if source := self._made_by(node.input[0], "QuantizeLinear"):
                self._rename(node.output[0], source.input[0])
                return []
            if self._made_by(node.input[0], "DynamicQuantizeLinear"):
                self._rename(node.output[0], node.input[0])
                return []
        return [] if node.op_type == "QuantizeLinear" else [node]

    def _made_by(self, name: str, operator: str) -> onnx.NodeProto | None:
        made = self.makers.get(name)
        return made if made is not None and made.op_type == operator else None

    def _rename(self, name: str, other: str) -> None:
        self.renamed[name] = self.renamed.get(other, other)

    def _one(self) -> str:
        from onnx import helper

        self.constants["exact_one"] = helper.make_tensor("exact_one", 1, [], [1.0])
        return "exact_one"

    def _product(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the product with numbers, and the sum with its bias, for one that rounds."""
        from onnx import helper

        bias = node.input[4] if len(node.input) > 4 else ""
        out = node.output[0] + ".product" if bias else node.output[0]
        made = self._dequantized(node.input[1], node.input[2], out, node.input[0])
        return [*made, helper.make_node("Add", [out, bias], [node.output[0]])] if bias else made

    def _dequantized(self, q: str, scale: str, out: str, value: str) -> list[onnx.NodeProto]:
        from onnx import helper

        # Of a scale for all the axis says nothing.
        weight = helper.make_node("DequantizeLinear", [q, scale], [out + ".weight"], axis=1)
        return [weight, helper.make_node("MatMul", [value, weight.output[0]], [out])]


@contextmanager
def switched_off() -> Iterator[None]:
    """Keep experts from kernels that round, for sessions that are made inside the block."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
