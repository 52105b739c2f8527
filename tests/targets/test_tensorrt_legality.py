"""What TensorRT cannot express is found in whole graphs, wherever it stands, and said with its place in the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calque import passes
from calque.converters import encoder
from calque.passes.cache_static import CacheStatic
from calque.passes.cast_precision import CastPrecision
from calque.passes.fuse_gelu import FuseGelu
from calque.passes.fuse_layer_norm import FuseLayerNorm
from calque.passes.fuse_rms_norm import FuseRmsNorm
from calque.passes.fuse_rotary import FuseRotary
from calque.passes.simplify_shapes import SimplifyShapes
from calque.passes.transpose_linear import TransposeLinear
from calque.source import ModelSource
from calque.targets import Problem, _to_onnx
from calque.targets._tensorrt_legality import illegal
from calque.traced import TracedModel
from tests.tensorrt_graphs import BOOL, F16, F32, F64, I8, I32, I64, Sketch, given, held, said, single
from tests.tiny_encoders import save_encoder
from tests.tiny_models import traced

_KEPT: list[TemporaryDirectory[str]] = []
WRITTEN = (FuseGelu(), FuseRmsNorm(), FuseLayerNorm(), FuseRotary())


@cache
def prepared(name: str) -> TracedModel:
    """A tiny model in float16, its keys and values in slots."""
    if name == "bert":
        _KEPT.append(TemporaryDirectory(ignore_cleanup_errors=True))
        folder = Path(_KEPT[-1].name)
        model = encoder.trace(ModelSource.resolve(str(save_encoder(folder / "model", name)), scratch=folder))
        passes.run((*WRITTEN, SimplifyShapes(), TransposeLinear(), CastPrecision("float16")), model)
        return model
    model = traced(name)
    passes.run((*WRITTEN, CacheStatic(), SimplifyShapes(), TransposeLinear(), CastPrecision("float16")), model)
    return model


def lowered(name: str) -> ir.Model:
    """The same as ONNX, but for what TensorRT's own lowering leaves out."""
    model = _to_onnx.to_onnx(prepared(name))
    for node in model.graph:
        node.attributes.pop("softmax_precision", None)
    return model


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def rules(model: ir.Model) -> list[str]:
    return [problem.why.partition(":")[0] for problem in illegal(model)]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma3_text", "phi3", "bert")]


@pytest.mark.parametrize("name", ["llama", "gpt2", *SLOW])
def test_what_tensorrt_runs_has_no_problem(name: str) -> None:
    assert illegal(lowered(name)) == []


def assert_in_llama(problem: Problem, module: str) -> None:
    assert problem.module == module
    assert re.search(r'modeling_llama\.py", line \d+', problem.source)
    assert problem.fix


def test_lengths_that_are_dropped_are_named_with_module_and_line() -> None:
    model = lowered("llama")
    node = attentions(model)[0]
    rows = next(value for value in model.graph.inputs if value.name == "write_indices")
    node.resize_inputs(7)
    node.replace_input_with(6, rows)
    (problem,) = illegal(model)
    assert problem.why.startswith("attention-lengths: nonpad_kv_seqlen is dropped")
    assert_in_llama(problem, "model.layers.0.self_attn")
    assert (problem.node, "attention: trt" in problem.fix) == (node.name, True)


def test_causal_over_slots_is_named_with_module_and_line() -> None:
    model = lowered("llama")
    node = attentions(model)[1]
    node.replace_input_with(3, None)
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    (problem,) = illegal(model)
    assert problem.why.startswith("attention-causal")
    assert_in_llama(problem, "model.layers.1.self_attn")


def test_slots_that_a_pass_writes_stand_where_they_are_read() -> None:
    model = lowered("llama")
    (problem, *_) = illegal(model, longest=129)
    assert problem.why.startswith("slots-overflow: a call of 129 tokens goes past the 128 slots")
    assert_in_llama(problem, "model.layers.0.self_attn")


def test_the_opset_s_own_precision_of_a_softmax_is_refused() -> None:
    assert rules(_to_onnx.to_onnx(prepared("llama"))) == ["attention-precision"] * 2


def test_where_nodes_come_from_is_in_no_file(tmp_path: Path) -> None:
    model = lowered("gpt2")
    assert all(node.meta[_to_onnx.SOURCE] for node in attentions(model))
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert b"modeling_gpt2" not in (tmp_path / "model.onnx").read_bytes()
    assert not any(node.metadata_props or node.doc_string for node in written.graph.node)


def test_the_graph_that_was_looked_at_is_as_it_was_and_no_weight_was_read() -> None:
    model = lowered("llama")
    before = ir.to_proto(without_weights(model)).SerializeToString()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor):
            value.const_value = unreadable(value)
    assert illegal(model) == []
    assert ir.to_proto(without_weights(model)).SerializeToString() == before


def without_weights(model: ir.Model) -> ir.Model:
    copy = model.clone()
    for name in list(copy.graph.initializers):
        copy.graph.inputs.append(copy.graph.initializers.pop(name))
    return copy


def unreadable(value: ir.Value) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    tensor = value.const_value
    assert isinstance(tensor, ir.LazyTensor)
    return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name)


def x(dtype: ir.DataType = F16) -> ir.Value:
    return given("x", dtype, "B", 16)


def branches(first: Callable[[Sketch, ir.Value], ir.Value], same_name: bool = False) -> ir.Model:
    """A choice between what ``first`` makes of the input and the input's absolute value."""
    read, graphs = x(), []
    for name, make in (("then", first), ("else", lambda sketch, value: sketch.add("Abs", value))):
        sketch = Sketch()
        made = make(sketch, read)
        made.name, made.dtype = "out" if same_name else f"{name}_out", F16
        for node in sketch.nodes:
            node.name = f"{name}_{node.name}"
        constants = [value for node in sketch.nodes for value in node.inputs if value is not None and value.const_value is not None]
        graphs.append(ir.Graph([], [made], nodes=sketch.nodes, initializers=constants, name=name))
    outer = Sketch()
    start = outer.add("Relu", read)
    for graph in graphs:
        for node in graph:
            node.replace_input_with(0, start)
    chosen = ir.node(
        "If",
        [given("choice", BOOL)],
        attributes={"then_branch": graphs[0], "else_branch": graphs[1]},
        name="choose",
    )
    chosen.outputs[0].name = "chosen"
    outer.nodes.append(chosen)
    return outer.model(chosen.outputs[0])


def collecting(length: ir.Value) -> ir.Model:
    """A loop that gives one row a turn."""
    turn, going, row = given("turn", I64), given("going", BOOL), given("row", F16, 16)
    sketch = Sketch()
    nexts = [sketch.add("Identity", going), sketch.add("Identity", row), sketch.add("Abs", row)]
    for value, dtype in zip(nexts, (BOOL, F16, F16), strict=True):
        value.dtype, value.name = dtype, f"next_{value.name}"
    body = ir.Graph([turn, going, row], nexts, nodes=sketch.nodes, name="body")
    outer = Sketch()
    outer.add("Loop", length, None, given("first", F16, 16), outputs=2, body=body)
    return outer.model(*outer.nodes[0].outputs)


# What TensorRT makes of it, the rule, and the graph.
WRONG: dict[str, tuple[str, str, Callable[[], ir.Model]]] = {
    "float64": ("taken", "double", lambda: single("Add", x(F64), held(np.ones(16), F64), dtype=F64)),
    "int16": ("refused", "type", lambda: single("Cast", x(), dtype=ir.DataType.INT16, to=int(ir.DataType.INT16))),
    "an operator of ONNX Runtime": ("refused", "operator", lambda: single("FastGelu", x(), domain="com.microsoft")),
    "an operator that it does not know": ("refused", "operator", lambda: single("BitwiseNot", x(I32), dtype=I32)),
    "integers multiplied": (
        "refused", "operator", lambda: single(
            "MatMulInteger", given("x", I8, "B", 16), given("y", I8, 16, 4), dtype=I32)),
    "a sum of two types": ("refused", "mixed-types", lambda: single("Add", x(), held(np.ones(16), F32))),
    "a product of two types": ("refused", "mixed-types", lambda: single("MatMul", x(), held(np.ones((16, 4)), F32))),
    "a norm of two types": ("refused", "mixed-types", lambda: single("LayerNormalization", x(), held(np.ones(16), F32))),
    "pieces of two types": ("refused", "mixed-types", lambda: single("Concat", x(), given("y", F32, "B", 16), axis=1)),
    "a reduction of ScatterND": ("refused", "scatter", lambda: single(
        "ScatterND", given("x", F16, 8, 16), held([[0]], I64), held(np.ones((1, 16))), reduction="add")),
    "a younger opset": ("taken", "opset", lambda: single("Relu", x(), opset=25)),
    "an operator in a branch": ("refused", "operator", lambda: branches(lambda sketch, value: sketch.add("BitwiseNot", value))),
    "branches of other ranks": ("failed", "branches", lambda: branches(lambda sketch, value: sketch.add("ReduceSum", value, keepdims=0))),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_name(name: str) -> None:
    _, rule, make = WRONG[name]
    assert set(rules(make())) == {rule}


@pytest.mark.parametrize("name", WRONG)
def test_tensorrt_takes_it_or_says_so_late(name: str) -> None:
    answer, _, make = WRONG[name]
    assert said(make())[0] == answer


@pytest.mark.parametrize("kind", ["Pow", "Clip", "RMSNormalization"])
def test_what_takes_floats_of_several_types_may(kind: str) -> None:
    model = single(kind, x(), held(np.ones(16) if kind == "RMSNormalization" else 2.0, F32))
    assert rules(model) == []
    assert said(model)[0] == "taken"


def test_branches_whose_outputs_have_one_name_are_refused() -> None:
    assert rules(branches(lambda sketch, value: sketch.add("Neg", value), same_name=True)) == ["branches"]
    assert rules(branches(lambda sketch, value: sketch.add("Neg", value))) == []


def test_a_loop_that_collects_has_a_length() -> None:
    assert rules(collecting(given("length", I64))) == ["loop"]
    assert rules(collecting(held(3, I64))) == []


def test_sequences_and_strings_have_no_form() -> None:
    sketch = Sketch()
    pieces = sketch.add("SplitToSequence", x())
    model = sketch.model(sketch.add("SequenceAt", pieces, held(0, I64)))
    assert set(rules(model)) == {"operator"}
    assert rules(single("Identity", given("x", ir.DataType.STRING, "B"), dtype=ir.DataType.STRING)) == ["type", "type"]


def test_what_stands_in_a_branch_or_a_function_has_a_place() -> None:
    model = branches(lambda sketch, value: sketch.add("Add", value, held(np.ones(16), F32)))
    model.graph[0].meta[_to_onnx.SOURCE] = ("model.choice", 'File "modeling.py", line 3, in forward')
    (problem,) = illegal(model)
    assert (problem.module, problem.source) == ("model.choice", 'File "modeling.py", line 3, in forward')


def test_functions_are_looked_into() -> None:
    inner = Sketch()
    value = ir.Value(name="a")
    made = inner.add("BitwiseNot", value)
    body = ir.Graph([value], [made], nodes=inner.nodes, opset_imports={"": 24}, name="f")
    model = single("Flip", x(I32), dtype=I32, domain="own")
    model.functions[("own", "Flip", "")] = ir.Function("own", "Flip", "", graph=body, attributes=[])
    assert rules(model) == ["operator"]
