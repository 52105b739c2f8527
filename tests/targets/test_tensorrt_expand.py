"""TensorRT's own attention means in the standard's operators what TensorRT says that it means, its wrong kinds too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from calque.errors import Unsupported
from calque.targets._tensorrt_expand import expand

Array = NDArray[Any]
BATCH, HEADS, GROUPS, NEW, SLOTS, SIZE = 2, 4, 2, 3, 9, 16
LENGTHS = np.array([7, 3], np.int32)


def own(kind: str, lengths: bool = True, **more: Any) -> ir.Model:
    """A graph of one attention of TensorRT's own."""
    shapes = {"q": [BATCH, HEADS, NEW, SIZE], "k": [BATCH, GROUPS, SLOTS, SIZE], "v": [BATCH, GROUPS, SLOTS, SIZE]}
    given = {name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)) for name, shape in shapes.items()}
    told = ir.Value(name="lengths", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([BATCH]))
    inputs = [*given.values(), None, more.pop("queries", None), told if lengths else None]
    node = ir.Node("trt", "TRT_Attention", inputs, ir.convenience.convert_attributes({"causal_kind": kind, **more}), name="attention")
    out = node.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([BATCH, HEADS, NEW, SIZE])
    graph = ir.Graph([*given.values(), *([told] if lengths else [])], [out], nodes=[node], name="main", opset_imports={"": 24, "trt": 1})
    return ir.Model(graph, ir_version=11)


def seen(kind: str, lengths: bool) -> Array:
    """Which keys a query sees, written out from what TensorRT's documentation says of each kind."""
    mask = np.zeros((BATCH, 1, NEW, SLOTS), bool)
    for row, query, key in np.ndindex(BATCH, NEW, SLOTS):
        held = int(LENGTHS[row]) if lengths else SLOTS
        last = {"lower_right": query + held - NEW, "upper_left": query, "none": SLOTS}[kind]
        mask[row, 0, query, key] = key <= last and key < held
    return mask


def wanted(feed: dict[str, Array], mask: Array) -> Array:
    key, value = (feed[name].repeat(HEADS // GROUPS, axis=1) for name in ("k", "v"))
    scores = np.where(mask, feed["q"] @ key.transpose(0, 1, 3, 2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = weights / weights.sum(-1, keepdims=True) @ value
    return out


@pytest.mark.parametrize(("kind", "lengths"), [("lower_right", True), ("lower_right", False), ("upper_left", True), ("none", True)])
def test_each_kind_means_what_tensorrt_says(kind: str, lengths: bool) -> None:
    model = own(kind, lengths)
    assert expand(model) == 1
    assert {node.domain for node in model.graph} == {""}
    assert "trt" not in model.opset_imports
    rng = np.random.default_rng(0)
    feed = {name: rng.normal(size=(BATCH, heads, size, SIZE)).astype(np.float32) for name, heads, size in
            (("q", HEADS, NEW), ("k", GROUPS, SLOTS), ("v", GROUPS, SLOTS))}  # fmt: skip
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"])
    [got] = session.run(["y"], feed | ({"lengths": LENGTHS} if lengths else {}))
    np.testing.assert_allclose(got, wanted(feed, seen(kind, lengths)), rtol=1e-5, atol=1e-5)


def test_a_graph_without_it_is_left() -> None:
    model = own("lower_right")
    expand(model)
    nodes = [node.name for node in model.graph]
    assert expand(model) == 0
    assert [node.name for node in model.graph] == nodes


def test_what_has_no_form_in_the_standard_is_refused() -> None:
    told = ir.Value(name="queries", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([BATCH + 1]))
    for model in (own("diagonal"), own("lower_right", queries=told)):
        with pytest.raises(Unsupported, match="attention: TRT_Attention"):
            expand(model)
