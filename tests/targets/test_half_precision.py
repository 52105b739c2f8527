"""fp16 and bf16 artifacts of ONNX Runtime through the gate, and faults that its wider limits still see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.fx import Graph, Node

from calque import cli
from calque.artifact import Artifact
from calque.errors import TargetUnavailable
from calque.pipeline import convert
from calque.recipe import Parity, Recipe
from calque.runtime import open_session
from calque.runtime.generate import generate
from calque.targets import _kernels
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel
from calque.validation.tolerance import tolerance
from calque.validation.validate import validate
from calque.weights import Derived
from tests.half_precision import Half, half
from tests.mutations.conftest import one_thread  # noqa: F401  # matrices this small gain nothing from more
from tests.mutations.fused import FAULTS
from tests.tiny_encoders import save_encoder
from tests.tiny_models import source_of

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here

aten, calque = torch.ops.aten, torch.ops.calque
STANDARD, RIGHT, FLOAT32 = OnnxRuntime("standard"), OnnxRuntime(padding="right"), OnnxRuntime(arithmetic="float32")


def artifact_rows(made: Half) -> list[dict[str, Any]]:
    return list(made.rows(made.target.open(made.artifact, 1)))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, OnnxRuntime()) for name in ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "mixtral", "gpt_oss")),
        *((name, STANDARD) for name in ("llama", "gemma2")),
        ("qwen3", RIGHT),
    ],
)
def test_artifact_in_fp16_passes_every_scenario(name: str, target: OnnxRuntime) -> None:
    made = half(name, "fp16", target)
    rows = artifact_rows(made)
    assert [row["reason"] for row in rows if row["status"] == "failed"] == []
    assert {row["limit"] for row in rows} == {tolerance("float16").limit(made.model.layers)}
    # It computes in float16: float32 would lie nearer.
    assert max(row["worst_sigma"] or 0.0 for row in rows) > 1e-3
    assert made.artifact.states[0].dtype == "float16"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma2"])
def test_float32_arithmetic_on_narrow_weights_is_as_near_as_float32(name: str, precision: str) -> None:
    made = half(name, precision, FLOAT32)
    rows = artifact_rows(made)
    assert [row["reason"] for row in rows if row["status"] == "failed"] == []
    assert {row["limit"] for row in rows} == {tolerance("float32").limit(made.model.layers)}


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_each_fault_of_a_joined_operator_is_caught_in_fp16(name: str, subtests: pytest.Subtests) -> None:
    made = half(name)
    assert made.failed(made.graph(made.model)) is None
    met = 0
    for fault, break_it in FAULTS.items():
        model = made.model.copy()
        if not break_it(model):
            continue
        met += 1
        with subtests.test(fault):
            row = made.failed(made.graph(model))
            assert row is not None
            assert row["worst_sigma"] >= 2 * row["limit"], row["reason"]
    assert met >= 3


def weight_of_few_bits(model: TracedModel) -> None:
    """One matrix went through 8 bits on its way to float16."""
    name = "model.layers.0.self_attn.o_proj.weight.transposed"
    weight = model.weights[name]
    model.weights.entries[name] = Derived((weight,), "few", lambda tensor: tensor.to(torch.float8_e4m3fn).half(), "float16", weight.shape)


def weight_unscaled(model: TracedModel) -> None:
    """What should have been cast was read as the bits of another type."""
    name = "model.layers.1.mlp.down_proj.weight.transposed"
    weight = model.weights[name]
    model.weights.entries[name] = Derived(
        (weight,), "bits", lambda tensor: tensor.bfloat16().view(torch.float16), "float16", weight.shape
    )  # fmt: skip


def norms_in_half(model: TracedModel) -> None:
    """Norms square what they are given in float16."""
    for node in [node for node in model.graph.nodes if node.target is calque.add_rms_norm.default]:
        x, residual, weight, epsilon = node.args
        with model.graph.inserting_before(node):
            total = _call(model.graph, aten.add.Tensor, x, residual)
            mean = _call(model.graph, aten.mean.dim, _call(model.graph, aten.mul.Tensor, total, total), [-1], True)
            root = _call(model.graph, aten.rsqrt.default, _call(model.graph, aten.add.Tensor, mean, epsilon))
            normed = _call(model.graph, aten.mul.Tensor, _call(model.graph, aten.mul.Tensor, total, root), weight)
        for part in list(node.users):
            part.replace_all_uses_with(normed if part.args[1] == 0 else total)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    return graph.call_function(target, args)


@pytest.mark.parametrize(("fault", "loudness"), [(weight_of_few_bits, 1.0), (weight_unscaled, 1.0), (norms_in_half, 400.0)])
def test_fault_of_half_precision_is_caught(fault: Callable[[TracedModel], None], loudness: float) -> None:
    made = half("llama", loudness=loudness)
    assert made.failed(made.target.open(made.artifact, 1)) is None
    model = made.model.copy()
    fault(model)
    row = made.failed(made.graph(model))
    assert row is not None
    assert row["worst_sigma"] is None or row["worst_sigma"] >= 2 * row["limit"], row["reason"]


def test_scores_that_float16_cannot_hold_are_added_up_in_float32() -> None:
    """GroupQueryAttention multiplies queries and keys in float32, as its kernel in float16 does not say."""
    kinds = {"q": 3, "k": 3, "v": 3, "pk": 0, "pv": 0}
    draw = np.random.default_rng(0)
    feed: dict[str, Any] = {
        name: draw.standard_normal((1, size, 32) if size else (1, 2, 0, 16)).astype(np.float16) * np.float16(300 if name in "qk" else 1)
        for name, size in kinds.items()
    }
    feed |= {"last": np.array([2], np.int32), "total": np.array(3, np.int32)}
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feed.items()}
    node = onnx.helper.make_node(
        "GroupQueryAttention", list(feed), ["y", "k2", "v2"], domain="com.microsoft", num_heads=2, kv_num_heads=2, scale=1.0
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node], "g", [onnx.helper.make_tensor_value_info(name, types[name], feed[name].shape) for name in feed],
        [onnx.helper.make_tensor_value_info("y", types["q"], None)],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    [got] = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)
    q, k, v = (torch.from_numpy(feed[name].astype(np.float32)).reshape(1, 3, 2, 16).transpose(1, 2) for name in "qkv")
    assert (q @ k.transpose(2, 3)).abs().max() > 65504
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2).reshape(1, 3, 32)
    np.testing.assert_allclose(got, wanted.numpy(), atol=2e-3)


def test_encoder_in_fp16_is_proved_and_gives_float32(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert")
    artifact = convert(Recipe(model=str(model), target="onnxruntime", precision="fp16"), tmp_path / "out")
    assert artifact.proof.numerics.status == artifact.proof.execution.status == "passed"
    assert {spec.dtype for spec in artifact.graphs["model"].outputs} == {"float32"}
    assert validate(artifact.folder)["status"] == "passed"


@pytest.fixture(scope="module")
def quill(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    recipe = Recipe(
        model="builtin:quill", target="onnxruntime", precision="fp16", layout="transformers.js", parity=Parity(scenarios=("single-prompt",))
    )  # fmt: skip
    return convert(recipe, tmp_path_factory.mktemp("quill") / "out")


def test_fp16_artifact_validates_and_generates_in_half_the_bytes(quill: Artifact) -> None:
    assert validate(quill.folder)["status"] == "passed"
    assert generate(quill.folder, "The function returns", 4)["tokens"][:2] == [266, 476]
    file = quill.folder / "onnx" / "model_fp16.onnx_data"
    assert quill.graphs["model"].file == "onnx/model_fp16.onnx"
    assert file.stat().st_size == pytest.approx(2 * 4_590_848, rel=0.01)
    assert (quill.folder / "genai_config.json").is_file()
    told = json.loads((quill.folder / "config.json").read_text())["transformers.js_config"]
    assert told["dtype"] == "fp16"


def bf16(tmp_path: Path, *more: str) -> int:
    settings = ["--target", "onnxruntime", "--precision", "bf16", "-o", str(tmp_path / "out")]
    return cli.main(["convert", str(source_of("llama").folder), *settings, *more])


def test_bf16_is_proved_on_the_graph_and_said_not_to_have_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bf16(tmp_path) == 0
    artifact = Artifact.read(tmp_path / "out")
    proof = artifact.proof
    assert (proof.numerics.status, proof.numerics.by) == ("passed", "traced graph")
    assert (proof.build.status, proof.execution.status) == ("not_run", "not_run")
    assert proof.execution.reason == proof.build.reason
    assert (proof.execution.reason or "").startswith("ONNX Runtime's CPU has no bfloat16 kernel of GroupQueryAttention, MatMul")
    assert {state.dtype for state in artifact.states} == {"bfloat16"}
    assert not (artifact.folder / "genai_config.json").exists()
    with pytest.raises(TargetUnavailable, match="lacks a kernel"):
        open_session(artifact.folder)("model", _one_token(artifact))
    assert cli.main(["validate", str(artifact.folder)]) == TargetUnavailable.exit_code
    assert cli.main(["generate", str(artifact.folder), "-p", "x"]) != 0
    capsys.readouterr()


def _one_token(artifact: Artifact) -> dict[str, Any]:
    import ml_dtypes

    one = np.ones((1, 1), np.int64)
    states = {s.input: np.zeros((1, int(s.shape[1]), 0, int(s.shape[3])), ml_dtypes.bfloat16) for s in artifact.states}
    return {"input_ids": one, "attention_mask": one, "position_ids": one - 1, **states}


def test_bf16_that_must_have_run_is_a_missing_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bf16(tmp_path, "--require", "execution") == TargetUnavailable.exit_code
    assert "execution: ONNX Runtime's CPU has no bfloat16 kernel of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bf16_with_float32_arithmetic_runs_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bf16(tmp_path, "--require", "execution", "--set", "arithmetic=float32") == 0
    proof = Artifact.read(tmp_path / "out").proof
    assert (proof.numerics.by, proof.execution.status) == ("onnxruntime", "passed")
    assert _kernels.without_bfloat16(tmp_path / "out" / "model.onnx") == []
    capsys.readouterr()


def test_list_of_passes_that_forgets_the_precision_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: builtin:quill\ntarget: onnxruntime\nprecision: fp16\npasses: [cache_dynamic]\n")
    assert cli.main(["convert", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 2
    assert "precision: fp16 and the list of passes disagree" in capsys.readouterr().err
