from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calque import passes, pipeline
from calque.artifact import MANIFEST, REPORT, Artifact, Check, Proof
from calque.conversion import Conversion, open_target
from calque.errors import ParityFailed, RecipeError, TargetUnavailable, Unsupported, UsageError
from calque.passes import Rewrites
from calque.passes.cache_dynamic import CacheDynamic
from calque.recipe import Recipe
from calque.runtime.onnxruntime_session import OnnxRuntimeSession
from calque.staging import staging
from calque.targets import Problem
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel, user_nodes
from calque.weights import WeightTable
from tests.calque.artifact_folder import content, names, write_artifact
from tests.shared_traces import own_traces
from tests.tiny_models import VOCABULARY, prompt, source_of, traced

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here

ONE = {"scenarios": ["single-prompt"]}


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{"model": str(source_of("llama").folder), "target": "onnxruntime", **settings})


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with own_traces():
        return pipeline.convert(recipe(), tmp_path_factory.mktemp("first") / "out")


def test_artifact_is_proved_whole_and_says_what_it_is(converted: Artifact) -> None:
    assert [getattr(converted.proof, name).status for name in ("numerics", "build", "execution")] == ["passed"] * 3
    assert converted.damaged_files() == []
    assert {"model.onnx", "model.onnx.data", "config.json", "reference/single-prompt.npz"} <= converted.files.keys()
    assert MANIFEST not in converted.files
    assert REPORT not in converted.files
    assert converted.passes == {
        "drop_zero_bias": 0,
        "fuse_gelu": 0, "fuse_rms_norm": 5, "fuse_layer_norm": 0, "fuse_rotary": 4, "fuse_residual_norm": 4, "cache_dynamic": 4,
        "fuse_grouped_attention": 2, "merge_qkv": 2, "simplify_shapes": 0, "transpose_linear": 11,
    }  # fmt: skip
    assert converted.tools.keys() == {"calque", *pipeline.TOOLS}
    assert [state.input for state in converted.states] == [spec.name for spec in converted.graphs["model"].inputs[3:]]
    assert names(converted.folder.parent) == ["out"]
    assert not [name for name in names(converted.folder) if name.startswith(".")]


def test_report_has_every_stage_and_scenario(converted: Artifact) -> None:
    report = json.loads((converted.folder / REPORT).read_text())
    assert [stage["name"] for stage in report["stages"]] == [
        "source", "trace", "passes", "lower", "emit", "reference", "prove",
    ]  # fmt: skip
    assert {row["status"] for row in report["scenarios"]} == {"passed"}


def test_second_conversion_gives_the_same_bytes_in_everything_but_the_report(converted: Artifact, tmp_path: Path) -> None:
    with own_traces():
        again = pipeline.convert(recipe(), tmp_path / "elsewhere")
    first, second = files(converted.folder), files(again.folder)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] in ([], [REPORT])


def scale_first_attention(apply: Callable[..., Rewrites]) -> Callable[..., Rewrites]:
    def broken(self: CacheDynamic, model: TracedModel) -> Rewrites:
        done = apply(self, model)
        attention = user_nodes(model.graph.nodes, torch.ops.calque.attention.default)[0]
        attention.args = (*attention.args[:4], 1.5 * float(attention.args[4]), *attention.args[5:])  # type: ignore[arg-type]
        return done

    return broken


def test_parity_failure_names_stage_and_layer_and_leaves_the_older_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    older = files(out)
    monkeypatch.setattr(CacheDynamic, "apply", scale_first_attention(CacheDynamic.apply))
    with pytest.raises(ParityFailed) as caught:
        pipeline.convert(recipe(), out, force=True)
    assert caught.value.exit_code == 3
    assert caught.value.what == "numerics failed: the artifact does not agree with the eager model"
    assert "first diverges at stage 'cache_dynamic', layer 1 key and value" in caught.value.where[0]
    assert len(caught.value.where) > 5
    assert files(out) == older
    rejected = Artifact.read(tmp_path / "out.rejected")
    assert rejected.proof.numerics.status == "failed"
    assert rejected.damaged_files() == []
    assert (rejected.folder / REPORT).is_file()
    assert names(tmp_path) == ["out", "out.rejected"]


def test_parity_failure_of_the_target_names_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = OnnxRuntimeSession.__call__

    def broken(self: OnnxRuntimeSession, graph: str, inputs: Any) -> Any:
        outputs: dict[str, Any] = {**call(self, graph, inputs)}
        return {**outputs, "present.0.key": outputs["present.0.key"] * np.float32(1.1)}

    monkeypatch.setattr(OnnxRuntimeSession, "__call__", broken)
    with pytest.raises(ParityFailed) as caught:
        pipeline.convert(recipe(parity=ONE), tmp_path / "out")
    assert "first diverges at stage 'onnxruntime', layer 0 key" in caught.value.where[0]
    assert names(tmp_path) == ["out.rejected"]


def test_ledger_that_does_not_balance_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unbalanced(_: WeightTable) -> None:
        raise Unsupported("planted")

    monkeypatch.setattr(WeightTable, "check", unbalanced)
    with pytest.raises(Unsupported, match="planted"):
        pipeline.convert(recipe(), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"target": "onnx-runtime"}, UsageError, "there is no target 'onnx-runtime'"),
        ({"options": {"operator": "standard"}}, RecipeError, "target onnxruntime has no option operator"),
        ({"passes": ["fuse_all"]}, RecipeError, "there is no pass 'fuse_all'"),
        ({"passes": [{"cache_dynamic": {"x": 1}}]}, RecipeError, "pass cache_dynamic has no option x"),
        ({"precision": "fp8"}, Unsupported, "precision: fp8"),
        ({"task": "object-detection"}, Unsupported, "no converter for the task 'object-detection'"),
        ({"parity": {"scenarios": ["single-promt"]}}, UsageError, "no model has these scenarios"),
    ],
    ids=["target", "option", "pass", "pass-option", "precision", "task", "scenario"],
)
def test_unknown_setting_is_refused_and_leaves_nothing(settings: dict[str, Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        pipeline.convert(recipe(**settings), tmp_path / "out")
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert names(tmp_path) == []


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", "old")
    with pytest.raises(UsageError):
        pipeline.convert(recipe(), tmp_path / "out", progress=lambda _: pytest.fail("work began"))
    assert content(tmp_path / "out") == "old"


@pytest.mark.parametrize("logits", ["last", "dynamic"])
def test_cut_logits_are_proved_and_answered(logits: str, tmp_path: Path) -> None:
    artifact = pipeline.convert(recipe(logits=logits), tmp_path / "out")
    assert artifact.proof.numerics.status == "passed"
    assert next(iter(artifact.passes)) == "keep_last_logits"
    inputs: dict[str, Any] = prompt(traced("llama"))
    session = OnnxRuntimeSession(artifact)
    if logits == "last":
        assert session("model", inputs)["logits"].shape == (2, 1, VOCABULARY)
        return
    assert artifact.graphs["model"].inputs[-1].name == "num_logits_to_keep"
    for count, kept in ((0, 5), (1, 1), (3, 3)):
        assert session("model", {**inputs, "num_logits_to_keep": np.array(count)})["logits"].shape == (2, kept, VOCABULARY)


def test_passes_of_the_recipe_replace_those_of_the_target_and_stages_are_announced(tmp_path: Path) -> None:
    told: list[str] = []
    artifact = pipeline.convert(recipe(passes=["cache_dynamic"], parity=ONE), tmp_path / "out", progress=told.append)
    assert artifact.passes == {"cache_dynamic": 4}
    assert told == ["source", "trace", "passes", "lower", "emit", "reference", "prove"]


def test_config_alone_is_converted_with_random_weights(tmp_path: Path) -> None:
    config = source_of("llama").folder / "config.json"
    artifact = pipeline.convert(recipe(model=str(config), random_weights=True, parity=ONE), tmp_path / "out")
    assert artifact.proof.numerics.status == "passed"
    assert artifact.recipe["random_weights"] is True
    assert not list(artifact.folder.glob("*.safetensors"))
    assert not [name for name, data in files(artifact.folder).items() if str(tmp_path).encode() in data]


def test_required_check_that_did_not_run_is_a_missing_device() -> None:
    proof = Proof(Check("passed"), Check("passed"), Check("not_run", reason="no GPU"))
    pipeline.require(recipe(require="build"), proof)
    pipeline.require(recipe(), proof)
    with pytest.raises(TargetUnavailable) as caught:
        pipeline.require(recipe(require="execution"), proof)
    assert caught.value.where == ("execution: no GPU",)


def test_problems_of_the_target_are_reported_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        OnnxRuntime, "problems", lambda self, model: [Problem(name, "", "", "is odd", "leave it out") for name in ("one", "two")]
    )
    with pytest.raises(Unsupported) as caught:
        pipeline.convert(recipe(), tmp_path / "out")
    assert caught.value.where == ("one: is odd", "two: is odd")
    assert caught.value.fix == "leave it out"
    assert names(tmp_path) == []


def test_plan_says_what_would_come_out_and_keeps_nothing(converted: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan = pipeline.plan(recipe())
    assert plan.keys() >= {
        "model", "target", "precision", "parameters", "weights_bytes", "artifact_bytes", "disk_bytes", "peak_memory_bytes",
        "decode_bytes_per_token", "nodes", "passes", "states", "limits", "problems",
    }  # fmt: skip
    assert plan["passes"] == converted.passes
    assert plan["problems"] == []
    assert plan["states"] == 4
    written = sum(path.stat().st_size for path in converted.folder.rglob("*") if path.is_file())
    assert plan["weights_bytes"] < written
    assert plan["artifact_bytes"] == pytest.approx(written, rel=0.1)
    json.dumps(plan)
    assert names(tmp_path) == []


def test_stages_for_the_search_are_the_trace_each_pass_and_the_target(converted: Artifact) -> None:
    asked, target = recipe(), open_target(recipe())
    stages = list(Conversion(asked, target, source_of("llama")).stages(converted))
    assert [stage.name for stage in stages] == ["trace", *(passes.name_of(step) for step in target.passes("fp32")), "onnxruntime"]


CONVERSION = textwrap.dedent("""
    import sys
    from pathlib import Path
    from calque.pipeline import convert
    from calque.recipe import Recipe
    convert(Recipe(model=sys.argv[1], target="onnxruntime"), Path(sys.argv[2]), force=True, progress=lambda name: print(name, flush=True))
""")


@pytest.mark.parametrize("stage", [pytest.param("lower", marks=pytest.mark.slow), pytest.param("emit", marks=pytest.mark.slow), "prove"])
def test_killed_conversion_leaves_no_half_artifact_and_the_older_one_whole(stage: str, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "out"
    write_artifact(out, "old")
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERSION, str(source_of("llama").folder), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert process.stdout is not None
    while (line := process.stdout.readline()) and line.strip() != stage:
        pass
    time.sleep(random.Random(stage).uniform(0, 0.3))
    process.kill()
    _, errors = process.communicate()
    assert line.strip() == stage, errors
    if "manifest.json" in names(out) and "config.json" in names(out):
        # The conversion was quicker than the kill: then it is there whole.
        assert Artifact.read(out).damaged_files() == []
    else:
        assert content(out) == "old"
    with staging(out, force=True) as fresh:
        write_artifact(fresh, "newer")
    assert names(out.parent) == ["out"]


def test_nothing_is_written_where_nothing_could_be_proved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", "old")
    monkeypatch.setattr(Conversion, "scenarios", lambda *_: [])
    with pytest.raises(Unsupported, match="nothing could be proved, so nothing was written"):
        pipeline.convert(recipe(), tmp_path / "out", force=True)
    assert content(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_logits_cut_twice_are_refused() -> None:
    asked = recipe(logits="dynamic", passes=["cache_dynamic", {"keep_last_logits": {"keep": "last"}}])
    with pytest.raises(UsageError, match="both cut the logits"):
        open_target(asked)


def test_value_that_an_option_cannot_take_is_refused() -> None:
    with pytest.raises(RecipeError, match="pass keep_last_logits cannot take these options"):
        open_target(recipe(passes=["cache_dynamic", {"keep_last_logits": {"keep": "banana"}}]))


def test_plan_of_random_weights_draws_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wide = {"hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64, "num_key_value_heads": 64}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 8, "vocab_size": 32000, **wide})
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # none of them would fit
    plan = pipeline.plan(Recipe(model=str(tmp_path / "model"), target="onnxruntime", random_weights=True))
    assert plan["weights_bytes"] > 30e9
    assert names(tmp_path) == ["model"]


def test_scenario_that_the_model_lacks_is_said_before_weights_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "emit", lambda *_: pytest.fail("weights are being written"))
    asked = recipe(parity={"scenarios": ["past-window-512-left"]})
    with pytest.raises(UsageError, match="past-window-512-left"):
        pipeline.convert(asked, tmp_path / "out")
