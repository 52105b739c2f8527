"""Small ONNX graphs, and what TensorRT-RTX's parser and builder make of them on this machine's CPU."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

F16, BF16, F32, F64 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE
I8, U8, I32, I64, BOOL = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL
LONGEST = {"B": 2, "S": 16, "N": 64}
_numbers = count()


def given(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    """An input of the graph."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def held(array: Any, dtype: ir.DataType = F16) -> ir.Value:
    """An initializer."""
    tensor = ir.tensor(np.asarray(array).astype(dtype.numpy()), name=f"held_{next(_numbers)}")
    return ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(dtype), shape=tensor.shape)  # type: ignore[arg-type]


class Sketch:
    """A graph that is written down node by node; what its nodes read are its inputs and initializers."""

    def __init__(self, opset: int = 24) -> None:
        self.opset, self.nodes = opset, list[ir.Node]()

    def add(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs, name=f"{kind}_{len(self.nodes)}")
        for place, output in enumerate(node.outputs):
            output.name = f"{node.name}_{place}"
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, *outputs: ir.Value, dtype: ir.DataType = F16) -> ir.Model:
        read = list(dict.fromkeys(value for node in self.nodes for value in node.inputs if value is not None and value.producer() is None))
        for output in outputs:
            output.dtype = output.dtype or dtype
        imports = {"": self.opset, **{node.domain: 1 for node in self.nodes if node.domain}}
        inputs = [value for value in read if value.const_value is None]
        held = [value for value in read if value.const_value is not None]
        graph = ir.Graph(inputs, outputs, nodes=self.nodes, initializers=held, opset_imports=imports, name="main")
        return ir.Model(graph, ir_version=11)


def single(kind: str, *inputs: ir.Value | None, dtype: ir.DataType = F16, opset: int = 24, **attributes: Any) -> ir.Model:
    """A graph of one node."""
    sketch = Sketch(opset)
    return sketch.model(sketch.add(kind, *inputs, **attributes), dtype=dtype)


def said(model: ir.Model, longest: Mapping[str, int] = LONGEST) -> tuple[str, str]:
    """``refused`` by the parser, ``failed`` in the builder, or ``taken``; and what was said, warnings too."""
    trt: Any = pytest.importorskip("tensorrt_rtx")
    lines: list[str] = []
    # A class of the SDK's own, made here since the SDK may be missing.
    log = type("Log", (trt.ILogger,), {"log": lambda _, severity, message: lines.append(message)})()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return "refused", "\n".join(parser.get_error(place).desc() for place in range(parser.num_errors))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for value in model.graph.inputs:
        shape = list(value.shape or ())
        if any(not isinstance(size, int) for size in shape):
            low, high = (
                [size if isinstance(size, int) else chosen(str(size.value)) for size in shape] for chosen in (lambda _: 1, longest.get)
            )
            profile.set_shape(value.name, low, low, high)
    config.add_optimization_profile(profile)
    return ("failed" if builder.build_serialized_network(network, config) is None else "taken"), "\n".join(lines)
