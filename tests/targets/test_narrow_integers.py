"""Integers and numbers of 8 bits multiplied in float16: what ONNX Runtime computes of the file, and that TensorRT builds it."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from calque import passes
from calque.choices import QUANTIZED
from calque.passes import Pass
from calque.passes.cache_static import CacheStatic
from calque.passes.cast_precision import CastPrecision
from calque.passes.lay_out_integers import LayOutIntegers
from calque.passes.quantize_activations import QuantizeActivations
from calque.passes.quantize_weights import QuantizeWeights
from calque.passes.transpose_linear import TransposeLinear
from calque.runtime.standard_session import LEVEL_SETTING
from calque.targets._exact import without_rounding
from calque.targets._to_onnx import to_onnx
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from calque.validation.eager import with_weights
from calque.validation.rounding import FACTOR, rounded_activations
from tests.passes.small_graphs import small
from tests.tiny_models import VOCABULARY, source_of, traced

ROWS = tuple(tuple(row) for row in np.random.default_rng(5).integers(3, VOCABULARY, (3, 24)).tolist())
WEIGHTS = {name: QuantizeWeights(**QUANTIZED[name]) for name in ("int8", "int4", "fp8")}
PLANS: dict[str, tuple[Pass, ...]] = {
    "int8": (WEIGHTS["int8"],),
    "int8-static": (QuantizeActivations("static", symmetric=True), WEIGHTS["int8"]),
    "int4": (WEIGHTS["int4"],),
    "fp8": (QuantizeActivations("auto", format="e4m3"), WEIGHTS["fp8"]),
    "fp8-activations": (QuantizeActivations("auto", format="e4m3"), WEIGHTS["fp8"]),
}
ROUNDS = ("int8-static", "fp8-activations")
NARROW = (LayOutIntegers("numbers"), TransposeLinear(), CastPrecision())
# What float16 may change of two layers, in σ.
TOLERANCE = 0.03
SLOTS = 32

Arrays = dict[str, NDArray[Any]]


class Stack(torch.nn.Module):
    """Three products, with and without a bias, of sizes that are no powers of two."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        sizes = ((64, 96), (96, 160), (160, 32))
        layers = [torch.nn.Linear(*size, bias=i != 1) for i, size in enumerate(sizes)]
        self.layers = torch.nn.ModuleList(layers)
        for layer in layers:
            for parameter in layer.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) / layer.in_features**0.5

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x,)


def stacked(kind: str) -> TracedModel:
    """The stack with integers; without a text nothing is measured that activations could be rounded by."""
    model = small(Stack(), {"x": torch.randn(3, 5, 64)}, {"x": {0: "batch"}})
    passes.run([*PLANS[kind], *NARROW], model)
    return model


@cache
def llama(kind: str) -> TracedModel:
    """The tiny llama as a target of static slots has it, made once a process."""
    model = traced("llama")
    model.samples = ROWS if kind in ROUNDS else ()
    passes.run([*PLANS[kind], CacheStatic(SLOTS), *NARROW], model)
    return model


def written(model: TracedModel) -> onnx.ModelProto:
    """The file as it is read back, with its weights."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(to_onnx(model), path, external_data="model.onnx.data")
        return onnx.load(path)


@cache
def _bytes_of(kind: str) -> bytes:
    return bytes(written(llama(kind)).SerializeToString())


def file_of(kind: str) -> onnx.ModelProto:
    """The tiny llama's file, for a test to change."""
    return onnx.load_model_from_string(_bytes_of(kind))


def run(file: onnx.ModelProto, inputs: Arrays, wanted: str) -> NDArray[Any]:
    """What ONNX Runtime gives where it rounds nothing on its own."""
    options = ort.SessionOptions()
    options.add_session_config_entry(LEVEL_SETTING, "0")
    options.log_severity_level = 4
    session = ort.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([wanted], inputs)[0])


def first_call(model: TracedModel) -> Arrays:
    """Two rows of tokens that are written to the first slots."""
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (2, 6))
    given: Arrays = {
        "input_ids": ids,
        "position_ids": np.broadcast_to(np.arange(6), ids.shape).copy(),
        "write_indices": np.zeros(2, np.int64),
        "kv_lengths": np.full(2, 6, np.int32),
    }
    return given | {state.input: np.zeros((2, *map(int, state.shape[1:])), np.float16) for state in model.states}


def eager(model: TracedModel, ids: NDArray[Any], rounded: bool) -> NDArray[Any]:
    """What the untouched model gives with the weights that the integers stand for."""
    reference = with_weights(source_of("llama").load_eager(), model.replaced)
    with torch.no_grad(), rounded_activations(reference, model.rounding if rounded else {}):
        return np.asarray(reference(torch.from_numpy(ids)).logits.numpy())


def far(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, in σ."""
    return float(np.abs(found.astype(np.float32) - expected).max() / expected.std())


@pytest.mark.parametrize("kind", PLANS)
def test_onnx_runtime_and_the_graph_agree_with_eager(kind: str) -> None:
    model = llama(kind)
    inputs, file = first_call(model), file_of(kind)
    onnx.checker.check_model(file)
    found = run(file, inputs, "logits")
    graph = TracedSession(model)("model", inputs)["logits"]
    exact = eager(model, inputs["input_ids"], rounded=False)
    limit = TOLERANCE
    if kind in ROUNDS:
        moved = far(eager(model, inputs["input_ids"], rounded=True), exact)
        assert moved > 3 * TOLERANCE
        limit = FACTOR * moved
        assert far(found, exact) > TOLERANCE
    assert far(found, exact) < limit
    assert far(graph, exact) < limit
    without_rounding(file)
    assert not [node for node in file.graph.node if node.op_type == "QuantizeLinear"]
    assert far(run(file, inputs, "logits"), exact) < TOLERANCE


@pytest.mark.parametrize("kind", PLANS)
def test_file_holds_the_integers_of_the_graph_and_scales_of_float16(kind: str) -> None:
    model = llama(kind)
    file = file_of(kind)
    held = {tensor.name: tensor for tensor in file.graph.initializer}
    nodes = [node for node in file.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    assert len(nodes) == (14 if kind.startswith("fp8") else 15)
    kinds = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "fp8": TensorProto.FLOAT8E4M3FN}
    for node in nodes:
        q, scale = (held[name] for name in node.input[:2])
        integers = q.data_type == TensorProto.INT8 and q.name.startswith("lm_head")
        assert q.data_type == kinds[kind.partition("-")[0]] or integers
        assert scale.data_type == TensorProto.FLOAT16
        expected = model.weights[q.name].read().to(torch.float32).numpy()
        assert np.array_equal(numpy_helper.to_array(q).astype(np.float32), expected)
    rounding = [node for node in file.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounding) == {"int8-static": 9, "fp8-activations": 8}.get(kind, 0)
    types = {(held[node.input[1]].data_type, held[node.input[2]].data_type) for node in rounding}
    assert types <= {(TensorProto.FLOAT16, kinds[kind.partition("-")[0]])}


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_stack_of_products_agrees_with_the_numbers_of_its_integers(kind: str) -> None:
    model = stacked(kind)
    x = np.random.default_rng(3).standard_normal((3, 5, 64)).astype(np.float32)
    stack = Stack()
    with_weights(stack, model.replaced)
    with torch.no_grad():
        [expected] = stack(torch.from_numpy(x))
    given = {"x": x.astype(getattr(np, model.inputs[0].dtype))}
    assert far(run(written(model), given, model.outputs[0].name), expected.numpy()) < TOLERANCE


def test_products_that_round_anew_in_each_call_do_so_in_float32_and_can_be_run_without() -> None:
    model = traced("llama")
    passes.run([QuantizeActivations(), WEIGHTS["int8"], CacheStatic(SLOTS), LayOutIntegers(), CastPrecision()], model)
    inputs, file = first_call(model), written(model)
    exact = eager(model, inputs["input_ids"], rounded=False)
    assert TOLERANCE < far(run(file, inputs, "logits"), exact) < 0.8
    without_rounding(file)
    assert far(run(file, inputs, "logits"), exact) < TOLERANCE


def engine_problems(file: onnx.ModelProto) -> list[str]:
    """What keeps TensorRT from building an engine of the file for any card; nothing where it does."""
    trt = pytest.importorskip("tensorrt_rtx")
    for node in file.graph.node:  # TensorRT's attention chooses the type of its softmax itself
        kept = [attribute for attribute in node.attribute if attribute.name != "softmax_precision"]
        del node.attribute[:]
        node.attribute.extend(kept)
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(message)

    builder = trt.Builder(log := Log())
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(file.SerializeToString()):
        return [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    for given in map(network.get_input, range(network.num_inputs)):
        sizes = partial(lambda shape, size: [size if known == -1 else known for known in shape], given.shape)
        profile.set_shape(given.name, sizes(1), sizes(2), sizes(4))
    config.add_optimization_profile(profile)
    return [] if builder.build_serialized_network(network, config) else said or ["no engine, and no reason"]


@pytest.mark.parametrize("kind", [*ROUNDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "int4", "fp8"))])
def test_tensorrt_builds_the_model(kind: str) -> None:
    assert engine_problems(file_of(kind)) == []


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_tensorrt_builds_products(kind: str) -> None:
    assert engine_problems(written(stacked(kind))) == []


def test_tensorrt_takes_no_integers_in_a_table() -> None:
    """Why lookups read numbers."""
    model = traced("llama")
    passes.run([WEIGHTS["int8"], CacheStatic(SLOTS), LayOutIntegers(), TransposeLinear(), CastPrecision()], model)
    assert any("only allowed before DQ" in problem for problem in engine_problems(written(model)))
