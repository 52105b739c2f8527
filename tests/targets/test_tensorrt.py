"""The target tensorrt: its files, its proof, its engines, and what it says where something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from calque import pipeline
from calque.artifact import Artifact
from calque.errors import BuildFailed, ParityFailed, TargetUnavailable, Unsupported, WontFit
from calque.pipeline import convert
from calque.recipe import Dims, Parity, Recipe
from calque.runtime import Decoder, open_session
from calque.targets import Built, _tensorrt_build
from calque.targets._tensorrt_profiles import profiles
from calque.targets.tensorrt import TensorRT
from calque.validation.report import Report
from tests.tiny_models import TINY, save_random

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here

SLOTS = 40
QUICK = Parity(scenarios=("single-prompt",))
PACKAGE = {"build.json", "profiles.json", "build_engine.py", "run_engine.py", "trtexec.txt"}


def recipe(model: Path, **settings: Any) -> Recipe:
    dims = Dims(batch_size=(1, 1, 4), sequence_length=(1, 16, 512), max_length=SLOTS)
    return Recipe(model=str(model), target="tensorrt", dims=dims, **settings)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of sliding and full layers, to convert."""
    return save_random(TINY["gemma3_text"], tmp_path_factory.mktemp("gemma") / "model")


@pytest.fixture(scope="module")
def plain(gemma: Path) -> Artifact:
    return convert(recipe(gemma, options={"sdk": "none"}), gemma.parent / "plain")


@pytest.fixture(scope="module")
def own(gemma: Path) -> Artifact:
    return convert(recipe(gemma, options={"sdk": "none", "attention": "trt"}), gemma.parent / "own")


def attentions(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node if "Attention" in node.op_type]


def test_the_file_is_of_the_standard_in_float16_and_proved_by_onnx_runtime(plain: Artifact) -> None:
    model = onnx.load(plain.folder / "model.onnx")
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    assert attentions(plain.folder / "model.onnx") == ["Attention"] * 3
    assert not [a.name for node in model.graph.node for a in node.attribute if a.name == "softmax_precision"]
    assert plain.precision == "fp16"
    assert {state.dtype for state in plain.states} == {"float16"}
    assert (plain.proof.numerics.status, plain.proof.numerics.by) == ("passed", "onnxruntime")
    rows = {row["name"]: row["status"] for row in Report.read(plain.folder).scenarios}
    asked = {"single-prompt", "decode-16", "ragged-right", "full-length", "full-length-right", "past-full-length", "past-window-8-right"}
    assert asked <= rows.keys()
    assert set(rows.values()) == {"passed"}


def test_the_folder_holds_what_builds_and_runs_an_engine_elsewhere(plain: Artifact) -> None:
    assert set(plain.files) >= PACKAGE
    build = json.loads((plain.folder / "build.json").read_text())
    assert (build["onnx"], build["engine"], build["network_flags"]) == ("model.onnx", "model.plan", ["STRONGLY_TYPED"])
    [profile] = json.loads((plain.folder / "profiles.json").read_text())["profiles"]
    assert profile["shapes"]["input_ids"] == {"min": [1, 1], "opt": [1, 16], "max": [4, SLOTS]}  # no call reaches past the slots
    assert profile["shapes"]["past_key_values.0.key"] == {
        bound: [rows, 2, SLOTS, 24] for bound, rows in (("min", 1), ("opt", 1), ("max", 4))
    }
    assert (plain.proof.build.status, plain.proof.execution.status) == ("not_run", "not_run")


def test_tensorrts_own_attention_lies_beside_its_expansion_over_the_same_weights(own: Artifact) -> None:
    # Two layers slide: they keep their mask.
    assert sorted(attentions(own.folder / "model.trt.onnx")) == ["Attention", "Attention", "TRT_Attention"]
    assert attentions(own.folder / "model.onnx") == ["Attention"] * 3
    assert own.passes["fuse_prefix_attention"] == 1
    assert json.loads((own.folder / "build.json").read_text())["onnx"] == "model.trt.onnx"
    assert (own.proof.numerics.status, own.proof.numerics.by) == ("passed", "expanded")
    both = [onnx.load(own.folder / name, load_external_data=False).graph.initializer for name in ("model.onnx", "model.trt.onnx")]
    places = [{t.name: [(e.key, e.value) for e in t.external_data] for t in tensors if t.external_data} for tensors in both]
    assert places[0] == places[1]
    assert len(places[0]) > 20


def test_the_wrong_kind_of_causality_is_caught_by_the_expansion(gemma: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a file that is right for a prompt and wrong for every step after it."""
    from calque.targets import _tensorrt_legality, _tensorrt_table

    monkeypatch.setattr(_tensorrt_table, "CAUSAL_KIND", "upper_left")
    with pytest.raises(Unsupported, match="cannot express") as caught:
        convert(recipe(gemma, options={"sdk": "none", "attention": "trt"}), tmp_path / "out")
    assert "attention-causal" in caught.value.where[0]
    # And were there no such rule:
    monkeypatch.setattr(_tensorrt_legality, "illegal", lambda *_: [])
    with pytest.raises(ParityFailed, match="numerics failed"):
        convert(recipe(gemma, options={"sdk": "none", "attention": "trt"}, parity=QUICK), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "model.trt.onnx").is_file()


def test_two_conversions_give_the_same_bytes(gemma: Path, own: Artifact, tmp_path: Path) -> None:
    again = convert(recipe(gemma, options={"sdk": "none", "attention": "trt"}), tmp_path / "again")
    assert dict(again.files) == dict(own.files)
    assert again.manifest() == own.manifest()


def with_dims(artifact: Artifact, **dims: list[int]) -> Artifact:
    """The artifact as a recipe of other dims would have it."""
    return replace(artifact, recipe={**artifact.recipe, "dims": {**artifact.recipe["dims"], **dims}})


def test_two_profiles_are_of_prompts_and_of_steps(plain: Artifact) -> None:
    prefill, decode = profiles(plain, "two")["profiles"]
    assert (prefill["name"], decode["name"]) == ("prefill", "decode")
    assert prefill["shapes"]["input_ids"]["max"] == [4, SLOTS]
    assert decode["shapes"]["input_ids"] == {"min": [1, 1], "opt": [1, 1], "max": [4, 1]}


def test_any_engine_takes_a_step_of_one_row(plain: Artifact) -> None:
    [profile] = profiles(with_dims(plain, batch_size=[2, 4, 8], sequence_length=[50, 60, 70]), "one")["profiles"]
    assert profile["shapes"]["input_ids"] == {"min": [1, 1], "opt": [4, SLOTS], "max": [8, SLOTS]}


def test_calque_s_own_runtime_runs_it_on_the_cpu(plain: Artifact) -> None:
    decoder = Decoder(plain, open_session(plain.folder), rows=1)
    import numpy as np

    first = decoder(np.array([[5, 9, 17]]), np.array([[1, 1, 1]]))
    assert first.shape[:2] == (1, 3)


@pytest.mark.parametrize(
    ("here", "gpu", "sdk", "by"),
    [
        ((), False, "auto", ""),
        (("tensorrt_rtx",), False, "auto", "tensorrt-rtx"),
        (("tensorrt", "tensorrt_rtx"), False, "auto", "tensorrt-rtx"),
        (("tensorrt", "tensorrt_rtx"), True, "auto", "tensorrt"),
        (("tensorrt",), True, "tensorrt-rtx", ""),
        (("tensorrt", "tensorrt_rtx"), True, "none", ""),
    ],
)
def test_what_builds_is_what_is_here(here: tuple[str, ...], gpu: bool, sdk: Any, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensorrt_build, "find_spec", lambda name: object() if name in here else None)
    monkeypatch.setattr(_tensorrt_build, "has_gpu", lambda: gpu)
    found, why = _tensorrt_build.chosen(sdk)
    assert found == by
    assert bool(why) is not bool(by)


def stand_in(found: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    return lambda *_: found


def test_what_did_not_run_is_exit_5_only_where_it_is_required(gemma: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_tensorrt_build, "find_spec", lambda _: None)
    made = convert(recipe(gemma, parity=QUICK), tmp_path / "made")
    assert made.proof.build.status == "not_run"
    assert "pip install" in (made.proof.build.reason or "")
    stages: list[str] = []
    for what in ("build", "execution"):
        with pytest.raises(TargetUnavailable, match=f"--require {what}"):
            convert(recipe(gemma, require=what), tmp_path / "required", progress=stages.append)
    assert stages == []  # said before any work
    assert not (tmp_path / "required").exists()


def test_a_builder_that_refuses_rejects_the_artifact_with_what_it_said(
    gemma: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_tensorrt_build, "chosen", lambda _: ("tensorrt-rtx", ""))
    said = stand_in({"exit_code": 1, "error": "the parser refuses model.onnx", "problems": ["node_7 (Attention): no kernel"]})
    monkeypatch.setattr("calque.targets._tensorrt_package.run_build", said)
    with pytest.raises(BuildFailed, match="tensorrt-rtx cannot build") as caught:
        convert(recipe(gemma, parity=QUICK), tmp_path / "out")
    assert caught.value.exit_code == 4
    assert "build: node_7 (Attention): no kernel" in caught.value.where
    rejected = Artifact.read(tmp_path / "out.rejected")
    assert (rejected.proof.numerics.status, rejected.proof.build.status) == ("passed", "failed")
    assert Report.read(rejected.folder).build["problems"] == ["node_7 (Attention): no kernel"]


@pytest.mark.parametrize(
    ("ran", "status", "failures"),
    [
        ({"exit_code": 0, "max_sigma": 0.012, "scenarios": [{"name": "batch-2", "status": "passed", "reason": ""}]}, "passed", ()),
        (
            {"exit_code": 3, "max_sigma": 2.0, "scenarios": [{"name": "batch-2", "status": "failed", "reason": "2.0 σ"}]},
            "failed",
            ("execution: batch-2: 2.0 σ",),
        ),
        ({"exit_code": -11, "error": "killed by SIGSEGV"}, "failed", ("execution: killed by SIGSEGV",)),
        ({"exit_code": 5, "error": "it cannot be loaded"}, "not_run", ()),
    ],
)
def test_what_ran_on_a_gpu_is_judged_by_how_it_ended(
    ran: dict[str, Any], status: str, failures: tuple[str, ...], plain: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {"exit_code": 0, "version": "11.4", "build_seconds": 1.0, "plan_bytes": 1, "peak_rss_bytes": 1}
    monkeypatch.setattr(_tensorrt_build, "chosen", lambda _: ("tensorrt", ""))
    monkeypatch.setattr(_tensorrt_build, "has_gpu", lambda: True)
    monkeypatch.setattr("calque.targets._tensorrt_package.run_build", stand_in(built))
    monkeypatch.setattr("calque.targets._tensorrt_package.run_validation", stand_in(ran))
    found = _tensorrt_build.build(plain, "auto", None)
    assert (found.build.status, found.execution.status, found.failures) == ("passed", status, failures)


def test_a_disk_that_is_full_is_no_verdict_on_the_artifact(gemma: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_tensorrt_build, "chosen", lambda _: ("tensorrt-rtx", ""))
    monkeypatch.setattr("calque.targets._tensorrt_package.run_build", stand_in({"exit_code": 6, "error": "No space left on device"}))
    with pytest.raises(WontFit, match="is full"):
        convert(recipe(gemma, parity=QUICK), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_an_option_that_changes_nothing_is_said(tmp_path: Path) -> None:
    from tests.tiny_encoders import save_encoder

    asked = Recipe(
        model=str(save_encoder(tmp_path / "model", "bert")),
        target="tensorrt",
        options={"attention": "trt", "profiles": "two", "sdk": "none"},
        parity=Parity(scenarios=("batch-2",)),
    )
    artifact = convert(asked, tmp_path / "out")
    assert not (artifact.folder / "model.trt.onnx").exists()
    assert artifact.proof.numerics.by == "onnxruntime"
    assert {note.partition(" changes nothing")[0] for note in Report.read(artifact.folder).notes} >= {"attention: trt", "profiles: two"}


def test_building_that_would_pass_the_memory_allowed_is_left_out(plain: Artifact) -> None:
    built = _tensorrt_build.build(plain, "auto", room=1 << 20)
    if _tensorrt_build.chosen("auto")[0]:
        assert "--max-memory leaves" in (built.build.reason or "")
    assert isinstance(built, Built)
    assert built.build.status == "not_run"


def test_torch_tensorrt_is_missed_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from calque.cli import main

    arguments = ["convert", "builtin:quill", "--target", "tensorrt", "--set", "via=torch-tensorrt", "-o", str(tmp_path / "out")]
    assert main(arguments) == 5
    said = capsys.readouterr().err
    assert "pip install" in said
    assert "torch-tensorrt" in said
    assert "trace" not in said


def test_plan_says_what_would_be_built(gemma: Path) -> None:
    plan = pipeline.plan(recipe(gemma, options={"attention": "trt"}))
    assert plan["problems"] == []
    assert plan["passes"]["fuse_prefix_attention"] == 1
    assert plan["peak_memory_bytes"]["build"] > plan["weights_bytes"]


def test_doctor_names_the_builders() -> None:
    assert {"tensorrt", "tensorrt-rtx"} <= {row[0] for row in TensorRT().doctor()}
