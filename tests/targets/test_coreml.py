"""Core ML packages: what the graph gives, at any length; integers, states and functions as they were asked for."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calque import passes
from calque.errors import TargetUnavailable, UsageError
from calque.runtime.mil_file import MilFile
from calque.targets import make, names
from calque.traced import user_nodes
from tests.targets.coreml_packages import Made, grown, made, write
from tests.tiny_models import TYPES, prompt, traced

# What rounding to float16 after each operator comes to, in spreads of an output.
HALF = 0.05
QUICK = ("llama", "gemma3_text")


def digest(made: Made) -> dict[str, str]:
    files = sorted(path for path in made.package.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weight_bytes(made: Made) -> int:
    return (made.package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TYPES])
def test_a_package_gives_what_the_graph_gives_at_lengths_that_were_not_traced(name: str) -> None:
    package = made(name)
    inputs = prompt(package.model, 7)
    inputs["attention_mask"][1, :3] = 0
    inputs["position_ids"][1] = [0, 0, 0, 0, 1, 2, 3]
    assert package.worst("model", inputs) < 1e-4
    # What is cached of padding is nobody's.
    inputs["attention_mask"][1, :3] = 1
    step = grown(inputs, package.session()("model", inputs), package)
    assert step["past_key_values.0.key"].shape[2] == 7
    assert package.worst("model", step) < 1e-4


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_narrow_package_gives_what_the_graph_gives(precision: str) -> None:
    package = made("llama", precision)
    inputs = prompt(package.model, 6)
    for state in package.model.states:
        inputs[state.input] = inputs[state.input].astype(np.float16)
    assert package.worst("model", inputs) < HALF


def test_attention_stays_whole_and_norms_are_in_float32() -> None:
    package = made("llama", "fp16")
    assert package.operators.count("scaled_dot_product_attention") == package.model.layers
    function = MilFile.read(package.package).function("main")
    kinds = {kind.element for op in function.block.operations if op.type == "rsqrt" for _, kind in op.outputs}
    assert kinds == {"float32"}


def test_names_types_and_bounds_are_those_of_core_ml() -> None:
    package = made("llama", "fp16", max_batch=3)
    function = MilFile.read(package.package).function("main")
    inputs = dict(function.block.inputs)
    assert list(inputs)[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values_0_key"]
    assert (inputs["input_ids"].element, inputs["past_key_values_0_key"].element) == ("int32", "float16")
    assert function.features["input_ids"].bounds == ((1, 3), (1, 128))
    assert function.features["past_key_values_0_key"].bounds[2] == (1, 128)
    assert function.block.outputs[:2] == ("logits", "present_0_key")
    assert package.artifact.graphs["model"].inputs[0].dtype == "int64", "as the session takes it"


def slots(package: Made, ids: NDArray[Any], held: int, states: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    rows, width = ids.shape
    return {
        "input_ids": ids,
        "position_ids": np.broadcast_to(np.arange(held, held + width), ids.shape).copy(),
        "write_indices": np.full(rows, held, dtype=np.int64),
        "kv_lengths": np.full(rows, held + width, dtype=np.int32),
        **states,
    }


@pytest.mark.parametrize("functions", ["one", "split"])
def test_a_state_is_kept_from_call_to_call(functions: str) -> None:
    package = made("llama", "fp16", cache="stateful", functions=functions)
    states = {state.input: np.zeros((2, *[int(size) for size in state.shape[1:]]), np.float16) for state in package.model.states}
    ids = np.random.default_rng(5).integers(3, 200, (2, 7))
    graphs = ("model", "model") if functions == "one" else ("prefill", "decode")
    first = slots(package, ids[:, :6], 0, states)
    assert package.worst(graphs[0], first) < HALF
    after = package.session()(graphs[0], first)
    kept = {state.input: after[state.output] for state in package.model.states}
    assert all(array[:, :, :6].any() and not array[:, :, 6:].any() for array in kept.values())
    assert package.worst(graphs[1], slots(package, ids[:, 6:], 6, kept)) < HALF
    file = MilFile.read(package.package)
    # Core ML refuses states beside some inputs with bounds and others without.
    features = file.function("main" if functions == "one" else "prefill").features
    assert features["input_ids"].bounds == ((1, 1), (1, 128))
    assert features["kv_lengths"].bounds == ((1, 1),)
    function = file.function("main" if functions == "one" else "decode")
    assert sum(kind.is_state for _, kind in function.block.inputs) == len(package.model.states)
    assert "present_0_key" not in function.block.outputs


def test_functions_share_their_weights_and_decode_takes_one_token() -> None:
    one, split = made("llama"), made("llama", functions="split")
    assert list(split.artifact.graphs) == ["prefill", "decode"]
    assert weight_bytes(split) == weight_bytes(one)
    function = MilFile.read(split.package).function("decode")
    assert dict(function.block.inputs)["input_ids"].shape[1] == 1
    inputs = prompt(split.model, 6)
    first = split.session()("prefill", inputs)
    assert split.worst("decode", grown(inputs, first, split)) < 1e-4


@pytest.mark.parametrize("weights", ["linear", "palettized"])
def test_the_integers_in_the_package_are_those_of_the_pass(weights: str) -> None:
    package = made("llama", "int4", weights=weights)
    found = make("coreml", {}).integers(package.artifact)  # type: ignore[attr-defined]
    parameters = {node: name for name, node in package.model.parameters().items()}
    nodes = user_nodes(package.model.graph.nodes, torch.ops.calque.dequantize_weight.default)
    assert len(found) == len({node.args[0] for node in nodes}) > 10
    for node in nodes:
        q, scale = (parameters[part] for part in node.args[:2])  # type: ignore[index]
        got = found[q.removesuffix(".q")]
        np.testing.assert_array_equal(got[0], package.model.weights[q].read().numpy())
        np.testing.assert_array_equal(got[1], package.model.weights[scale].read().numpy())
    assert ("constexpr_lut_to_dense" in package.operators) == (weights == "palettized")


def test_integers_make_a_package_small_and_nothing_is_stored_twice() -> None:
    sizes = {precision: weight_bytes(made("llama", precision)) for precision in ("fp32", "fp16", "int8", "int4")}
    held = made("llama").model.weights.nbytes()
    assert held <= sizes["fp32"] < 1.1 * held
    shares = {"fp16": 0.55, "int8": 0.33, "int4": 0.26}
    assert [name for name, share in shares.items() if sizes[name] > share * sizes["fp32"]] == []


def test_a_palettized_package_gives_what_the_linear_one_gives() -> None:
    inputs = prompt(made("llama", "int4").model, 5)
    for state in made("llama", "int4").model.states:
        inputs[state.input] = inputs[state.input].astype(np.float16)
    one, other = (made("llama", "int4", weights=weights).session()("model", inputs) for weights in ("linear", "palettized"))
    np.testing.assert_array_equal(one["logits"], other["logits"])


def test_the_same_model_gives_the_same_bytes() -> None:
    first = digest(made("llama", "int4"))
    assert set(first) == {"Manifest.json", "model.mlmodel", "weight.bin"}
    assert digest(write(traced("llama"), "int4")) == first


def test_nothing_is_said_while_a_package_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    write(traced("llama"), "fp16")
    assert capfd.readouterr() == ("", "")


def test_every_node_that_mil_cannot_say_is_a_problem_with_its_place() -> None:
    model, target = traced("llama"), make("coreml", {})
    passes.run(target.passes("fp32"), model)
    for node in user_nodes(model.graph.nodes, torch.ops.aten.silu.default):
        node.target = torch.ops.aten.bincount.default
    found = target.problems(model)
    assert len(found) == model.layers
    assert all("aten.bincount.default has no translation to MIL" in problem.why and "mlp" in problem.module for problem in found)
    assert all(".py" in problem.source and problem.fix for problem in found)


def test_every_node_that_coremltools_refuses_is_a_problem_too_and_no_weight_is_read_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = traced("llama"), make("coreml", {})
    passes.run(target.passes("fp32"), model)
    for node in user_nodes(model.graph.nodes, torch.ops.calque.rotary.default):
        node.update_arg(1, node.args[0])  # angles of another rank
    monkeypatch.setattr(type(model.weights.distinct()[0]), "read", lambda weight: pytest.fail("a weight was read"))
    found = target.problems(model)
    assert len(found) == 2 * model.layers
    assert all("self_attn" in problem.module and problem.source for problem in found)


@pytest.mark.slow
def test_what_has_no_rule_is_written_in_what_has() -> None:
    model = traced("llama")
    for node in user_nodes(model.graph.nodes, torch.ops.aten.silu.default):
        node.target = torch.ops.aten.hardswish.default
    assert write(model).worst("model", prompt(model, 6)) < 1e-4


def test_a_length_that_values_decide_is_refused() -> None:
    model, target = traced("llama"), make("coreml", {})
    passes.run([passes.load("keep_last_logits", {"keep": "dynamic"}), *target.passes("fp32")], model)
    assert "--logits last" in target.problems(model)[-1].fix


def test_a_model_without_padding_on_the_left_is_told_to_use_states() -> None:
    model, target = traced("llama"), make("coreml", {})
    passes.run(target.passes("fp32"), model)
    model.limits = dataclasses.replace(model.limits, padding="right")
    assert [problem.fix for problem in target.problems(model)] == ["set cache: stateful"]


def test_options_that_do_not_go_with_a_precision_are_refused() -> None:
    assert "coreml" in names()
    with pytest.raises(UsageError, match="states are float16"):
        make("coreml", {"cache": "stateful"}).passes("fp32")
    with pytest.raises(UsageError, match="palettized belongs to precision: int4"):
        make("coreml", {"weights": "palettized"}).passes("int8")
    with pytest.raises(UsageError, match="1 or more expected"):
        make("coreml", {"max_batch": 0})


def test_what_a_mac_alone_can_do_is_said_to_be_missing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target: Any = make("coreml", {})
    monkeypatch.setattr("calque.targets.coreml.on_mac", lambda: False)
    with pytest.raises(TargetUnavailable, match="macOS and iOS alone"):
        target.require("build")
    target.require(None)
    built = target.build(made("llama").artifact, lambda: None, None)
    assert {built.build.status, built.execution.status} == {"not_run"}
    assert "macOS" in str(built.build.reason)


@pytest.mark.parametrize("refused", [False, True])
def test_a_mac_compiles_the_package(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = make("coreml", {})
    asked = []

    def compile_model(path: str, destination: str) -> None:
        asked.append(Path(path).name)
        if refused:
            raise RuntimeError("Error reading protobuf spec")

    monkeypatch.setattr("calque.targets.coreml.on_mac", lambda: True)
    monkeypatch.setattr("coremltools.models.utils.compile_model", compile_model)
    target.require("execution")
    built = target.build(made("llama").artifact, lambda: None, None)
    assert asked == ["model.mlpackage"]
    assert (built.build.status, built.execution.status) == (("failed", "not_run") if refused else ("passed", "passed"))
    assert built.failures == (("build: Error reading protobuf spec",) if refused else ())
