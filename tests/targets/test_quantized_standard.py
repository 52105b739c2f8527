"""Integers in operators of the standard, and activations of 8 bits in either: what is in the file, and that it passes the gate."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from calque import cli, passes
from calque.artifact import Artifact
from calque.choices import QUANTIZED
from calque.errors import UsageError
from calque.passes.quantize_weights import QuantizeWeights
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.targets._exact import ExactSession
from calque.targets.onnxruntime import FILE, OnnxRuntime
from calque.traced import user_nodes
from calque.validation.compare import EXACT
from tests.mutations.conftest import one_thread  # noqa: F401  # matrices this small gain nothing from more
from tests.tiny_models import source_of, traced

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here

HELDOUT = Path(__file__).parents[2] / "calque" / "models" / "quill" / "heldout.txt"
STANDARD = {"operators": "standard"}
DYNAMIC = {"activations": "dynamic"}


def converted(name: str, precision: str, options: dict[str, Any], folder: Path) -> Artifact:
    recipe = Recipe.of({"model": str(source_of(name).folder), "target": "onnxruntime", "precision": precision, "options": options})
    return convert(recipe, folder / "out")


def operators(artifact: Artifact) -> Counter[str]:
    model = onnx.load(artifact.folder / FILE, load_external_data=False)
    return Counter(f"{node.domain}:{node.op_type}".removeprefix(":") for node in model.graph.node)


def worst(artifact: Artifact) -> tuple[float, float]:
    """The worst figure without rounding, and as the artifact is."""
    rows = json.loads((artifact.folder / "report.json").read_text())["scenarios"]
    told = [(row["name"].endswith(EXACT), row["worst_sigma"]) for row in rows if row["worst_sigma"] is not None]
    return tuple(max(figure for exact, figure in told if exact == which) for which in (True, False))


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt2"))])
@pytest.mark.parametrize(
    ("precision", "options"), [("int4", STANDARD), ("int8", STANDARD), ("int8", DYNAMIC), ("int8", STANDARD | DYNAMIC)], ids=str
)
def test_artifact_passes_the_gate_with_rounding_and_tightly_without(
    name: str, precision: str, options: dict[str, Any], tmp_path: Path
) -> None:
    artifact = converted(name, precision, options, tmp_path)
    exact, rounded = worst(artifact)
    assert exact < 5e-5 < 1e-3 < rounded
    found = operators(artifact)
    assert not [known for known in found if ":" in known] or "operators" not in options
    products = {"MatMulInteger", "com.microsoft:DynamicQuantizeMatMul"} & set(found)
    assert bool(products) == ("activations" in options)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt2"))])
@pytest.mark.parametrize(
    "weights", [QuantizeWeights(**QUANTIZED["int8"]), QuantizeWeights(symmetric=False), QuantizeWeights(group=16)], ids=str
)
def test_integers_in_the_file_are_those_of_the_graph(name: str, weights: QuantizeWeights, tmp_path: Path) -> None:
    model, target = traced(name), OnnxRuntime("standard")
    passes.run_one(weights, model)
    names = {node: found for found, node in model.parameters().items()}
    nodes = user_nodes(model.graph.nodes, torch.ops.calque.dequantize_weight.default)
    wanted = {names[node.args[0]]: (int(node.args[3]), model.weights[names[node.args[0]]].read().numpy()) for node in nodes}  # type: ignore[index, arg-type]
    later = [rewrite for rewrite in target.passes("int8") if passes.name_of(rewrite) != "quantize_weights"]
    for rewrite in later:
        passes.run_one(rewrite, model)
    target.emit(target.lower(model), model, tmp_path)
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / FILE).graph.initializer}
    for held, (bits, q) in wanted.items():
        tensor = stored.get(f"{held}.transposed", stored.get(held))
        assert tensor is not None, held
        assert tensor.data_type == (onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8)
        found = numpy_helper.to_array(tensor).astype(np.int8)
        assert np.array_equal(found.T if tensor.name.endswith(".transposed") else found, q), held


def test_runtime_joins_integers_with_their_products_instead_of_making_numbers_of_them(tmp_path: Path) -> None:
    artifact = converted("llama", "int4", STANDARD, tmp_path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(artifact.folder / FILE), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)
    assert (found["MatMulNBits"], found["DequantizeLinear"]) == (15, 0)


def test_product_of_the_runtime_is_that_of_the_graph() -> None:
    from onnx import helper

    generator = torch.Generator().manual_seed(4)
    x, bias = torch.randn(3, 5, 64, generator=generator) * 3, torch.randn(48, generator=generator)
    q = torch.randint(-127, 128, (64, 48), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, generator=generator) * 0.01
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "q", "scale", "", "bias"], ["y"], domain="com.microsoft")
    given = {"x": x, "q": q, "scale": scale, "bias": bias}
    values = [helper.make_tensor_value_info(n, 3 if t.dtype == torch.int8 else 1, t.shape) for n, t in given.items()]
    graph = helper.make_graph([node], "one", values, [helper.make_tensor_value_info("y", 1, [3, 5, 48])])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    [y] = session.run(None, {n: t.numpy() for n, t in given.items()})
    wanted = torch.ops.calque.dynamic_linear(x, q, scale, bias)
    assert np.abs(y - wanted.numpy()).max() < 1e-5 * wanted.std()
    assert np.abs(y - (x @ (q * scale) + bias).numpy()).max() > 1e-3 * wanted.std()


@pytest.mark.slow
def test_static_ranges_come_from_a_text_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(HELDOUT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    flags = ["--target", "onnxruntime", "builtin:quill", "--precision", "int8-static", "-o", str(tmp_path / "out")]
    assert cli.main(["convert", *flags]) == 2
    assert "--calibration" in capsys.readouterr().err
    assert cli.main(["convert", *flags, "--calibration", str(text)]) == 0
    artifact = Artifact.read(tmp_path / "out")
    exact, rounded = worst(artifact)
    assert exact < 5e-5 < 1e-2 < rounded
    found = operators(artifact)
    assert (found["QuantizeLinear"], found["MatMul"]) == (25, 31)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(artifact.folder / FILE), options, providers=["CPUExecutionProvider"])
    made = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)
    assert (made["MatMulIntegerToFloat"], made["MatMul"]) == (31, 0)  # integers are multiplied


def test_exact_session_sees_one_integer_that_rounding_would_hide(tmp_path: Path) -> None:
    artifact = converted("llama", "int8", DYNAMIC, tmp_path)
    session = ExactSession(artifact, 1)
    ids = np.arange(4, 12)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(8)[None]}
    for state in artifact.states:
        inputs[state.input] = np.zeros(
            [1 if size == "batch_size" else size if isinstance(size, int) else 0 for size in state.shape], np.float32
        )
    before: Any = session("model", inputs)["logits"]
    data = bytearray((artifact.folder / "model.onnx.data").read_bytes())
    model = onnx.load(artifact.folder / FILE, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("lm_head.weight.q.transposed"))
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    data[offset] ^= 4  # one integer of one weight
    (artifact.folder / "model.onnx.data").write_bytes(bytes(data))
    after: Any = ExactSession(artifact, 1)("model", inputs)["logits"]
    assert np.abs(after - before).max() / before.std() > 5e-4


@pytest.mark.parametrize(
    ("target", "precision"),
    [(OnnxRuntime(activations="dynamic"), "int4"), (OnnxRuntime(activations="float32"), "int8-static")],
)
def test_activations_that_do_not_go_with_the_precision_are_refused(target: OnnxRuntime, precision: str) -> None:
    with pytest.raises(UsageError, match="does not go with precision"):
        target.passes(precision)
