from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calque.errors import ArtifactUnreadable
from calque.runtime.onnx_file import OnnxFile
from calque.states import key_value_states
from tests.runtime.cached import SIZE, VOCABULARY, write_grouped, write_static

STATES = key_value_states(0, 1, SIZE, SIZE, None)
PAST, PRESENT = ["past_key_values.0.key", "past_key_values.0.value"], ["present.0.key", "present.0.value"]


def save(path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], **how: Any) -> OnnxFile:
    graph = helper.make_graph(nodes, "g", [], [], weights)
    onnx.save(helper.make_model(graph), path, **how)
    return OnnxFile.read(path)


@pytest.mark.parametrize("external", [False, True])
def test_tables_that_are_looked_up_do_not_count(tmp_path: Path, external: bool) -> None:
    weights = [
        numpy_helper.from_array(np.zeros((100, 8), np.float32), "embedding"),
        numpy_helper.from_array(np.zeros((50, 8), np.float32), "tied"),
        numpy_helper.from_array(np.zeros((8, 4), np.float16), "product"),
        helper.make_tensor("packed", TensorProto.INT4, [3, 5], [0] * 15),
    ]
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["a"]),
        helper.make_node("Gather", ["tied", "ids"], ["b"]),
        helper.make_node("MatMul", ["b", "tied"], ["c"]),
        helper.make_node("MatMul", ["c", "product"], ["d"]),
        helper.make_node("Gather", ["d", "packed"], ["e"]),  # as an index: all of it is read
    ]
    how = {"save_as_external_data": True, "size_threshold": 0, "location": "model.onnx.data"} if external else {}
    found = save(tmp_path / "model.onnx", nodes, weights, **how)
    assert found.weights == {"embedding": 3200, "tied": 1600, "product": 64, "packed": 8}
    assert found.bytes_per_call() == 1600 + 64 + 8


def test_a_graph_is_read_as_onnx_reads_it(tmp_path: Path) -> None:
    write_grouped(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    found = OnnxFile.read(tmp_path / "model.onnx")
    told = [(node.op_type, tuple(node.input), tuple(node.output)) for node in graph.node]
    assert [(node.operator, node.inputs, node.outputs) for node in found.nodes] == told
    assert found.weights == {tensor.name: numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer}
    assert found.bytes_per_call() == 4 * VOCABULARY * 2 * SIZE + 8  # the head and one axis


def test_only_caches_that_one_operator_reads_may_share_a_buffer(tmp_path: Path) -> None:
    write_grouped(tmp_path / "plain")
    write_grouped(tmp_path / "reading", reads_length=True)
    write_static(tmp_path / "static")
    shares = {name: OnnxFile.read(tmp_path / name / "model.onnx").shares_buffers(STATES) for name in ("plain", "reading", "static")}
    assert shares == {"plain": True, "reading": False, "static": False}
    assert not OnnxFile.read(tmp_path / "plain" / "model.onnx").shares_buffers(())
    more = (*STATES, *key_value_states(1, 1, SIZE, SIZE, None))  # one that no operator reads
    assert not OnnxFile.read(tmp_path / "plain" / "model.onnx").shares_buffers(more)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["q", "k", "v", PAST[1], PAST[0]], ["out", *PRESENT]),  # the key follows the value
        (["q", "k", "v", *PAST], ["out", "other", PRESENT[1]]),
        (["q", PAST[0], "v", *PAST], ["out", *PRESENT]),
        (["q", "k", "v", PAST[0]], ["out", *PRESENT]),
    ],
)
def test_a_cache_that_goes_elsewhere_shares_none(tmp_path: Path, inputs: list[str], outputs: list[str]) -> None:
    node = helper.make_node("GroupQueryAttention", inputs, outputs, domain="com.microsoft")
    assert not save(tmp_path / "model.onnx", [node], []).shares_buffers(STATES)


def test_a_graph_within_a_node_may_read_anything(tmp_path: Path) -> None:
    inner = helper.make_graph([helper.make_node("Identity", [PAST[0]], ["x"])], "inner", [], [])
    nodes = [
        helper.make_node("GroupQueryAttention", ["q", "k", "v", *PAST], ["out", *PRESENT], domain="com.microsoft"),
        helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner),
    ]
    assert not save(tmp_path / "model.onnx", nodes, []).shares_buffers(STATES)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x3a\xff\x01", b"\xff" * 40, None])
def test_what_is_no_model_is_said_to_be_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactUnreadable, match=r"model\.onnx cannot be read"):
        OnnxFile.read(path)


def test_a_file_cut_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    write_grouped(tmp_path)
    path = tmp_path / "model.onnx"
    whole = path.read_bytes()
    for end in range(1, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(ArtifactUnreadable):
            OnnxFile.read(path)
