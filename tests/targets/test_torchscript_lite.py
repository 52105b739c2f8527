"""Files for phones: what their runtime lacks is told before anything is written, older bytecode runs, calls lie in the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.jit import mobile

from calque import passes
from calque.artifact import Artifact
from calque.errors import ArtifactUnreadable, TargetUnavailable, Unsupported, UsageError
from calque.runtime.torchscript_session import LiteSession, quiet
from calque.targets import _mobile_operators, _torchscript_check, _torchscript_file, _torchscript_integers
from calque.targets._torchscript_prepack import prepack
from calque.targets.torchscript_lite import FILE, TorchScriptLite
from calque.traced import TracedModel
from tests.tiny_models import Tiny, answers, prompt, traced, traced_as


def emitted(name: str, precision: str, folder: Path, **options: Any) -> tuple[TracedModel, Artifact]:
    model = traced(name)
    target = TorchScriptLite(**options)
    done = passes.run(target.passes(precision), model)
    assert target.problems(model) == []
    written = target.emit(target.lower(model), model, folder)
    return model, Artifact(folder, "torchscript-lite", {}, {}, precision, {}, written.graphs, model.states, done, {}, written.limits)


@pytest.mark.parametrize(("name", "precision"), [("llama", "fp32"), ("gpt2", "int8")])
def test_the_lite_interpreter_gives_what_the_graph_gives(name: str, precision: str, tmp_path: Path) -> None:
    model, artifact = emitted(name, precision, tmp_path)
    weights = model.weights.nbytes()
    assert weights < (tmp_path / FILE).stat().st_size < weights + 80_000, "weights are stored once"
    session = LiteSession(artifact)
    for length in (5, 8):
        inputs = prompt(model, length)
        np.testing.assert_allclose(
            np.asarray(session("model", inputs)["logits"], np.float32),
            answers(model, inputs)["logits"],
            atol=0.3 if precision == "int8" else 1e-4,
        )


@pytest.mark.parametrize("bytecode", [5, 8])
def test_bytecode_is_of_the_version_asked_for_and_runs(bytecode: int, tmp_path: Path) -> None:
    model, artifact = emitted("llama", "int8", tmp_path, bytecode=bytecode)
    assert mobile._get_model_bytecode_version(str(tmp_path / FILE)) == bytecode
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert LiteSession(artifact)("model", prompt(model))["logits"].shape == (2, 5, 211)


def test_the_file_brings_a_call_and_says_what_calls_look_like(tmp_path: Path) -> None:
    model, _ = emitted("llama", "fp32", tmp_path)
    extra = {_torchscript_file.METADATA: ""}
    with quiet():
        loaded = mobile._load_for_lite_interpreter(str(tmp_path / FILE))  # type: ignore[no-untyped-call]
        (example,) = loaded.run_method("get_all_bundled_inputs")
        torch.jit.load(str(tmp_path / FILE), _extra_files=extra)  # type: ignore[no-untyped-call]
    assert loaded(*example)[0].shape == (1, 4, 211)
    said = json.loads(extra[_torchscript_file.METADATA])
    assert [spec["name"] for spec in said["inputs"]] == [spec.name for spec in model.inputs]
    assert [spec["dtype"] for spec in said["inputs"]] == [str(value.dtype).removeprefix("torch.") for value in example]


def test_weights_that_an_engine_saves_twice_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = next((name for name in ("fbgemm", "x86") if name in torch.backends.quantized.supported_engines), None)
    if engine is None:
        pytest.skip("this torch has no engine that saves weights twice")
    monkeypatch.setattr(_torchscript_integers, "ENGINE", engine)
    model = traced_as(Tiny("gpt2", vocabulary=2000))  # its head is its table
    target = TorchScriptLite()
    passes.run(target.passes("int8"), model)
    with pytest.raises(Unsupported, match="more than once"):
        target.emit(target.lower(model), model, tmp_path)


def test_two_conversions_are_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for _ in range(2):
        emitted("llama", "int8", tmp_path)
        digests.add(hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_an_operator_that_phones_lack_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held = _mobile_operators.operators()
    table = {name: types for name, types in held.items() if name != "aten::silu"} | {"aten::rsqrt": ["str"]}
    model = traced("llama")
    target = TorchScriptLite()
    passes.run(target.passes("fp32"), model)
    written = target.lower(model)
    monkeypatch.setattr(_torchscript_check, "operators", lambda: table)
    found = target.problems(model)
    assert sum("has no operator aten::silu" in problem.why for problem in found) == 2
    assert any("aten::rsqrt with arguments (str), and not (Tensor)" in problem.why for problem in found)
    assert all(problem.module and "line " in problem.source for problem in found if "silu" in problem.why)
    monkeypatch.setattr(_torchscript_file, "operators", lambda: table)
    with pytest.raises(Unsupported, match="cannot run"):
        target.emit(written, model, tmp_path)


def test_bytecode_that_is_not_what_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mobile, "_get_model_bytecode_version", lambda path: 9)
    with pytest.raises(Unsupported, match="bytecode"):
        emitted("llama", "fp32", tmp_path)


def test_the_table_is_that_of_the_last_release() -> None:
    assert _mobile_operators.runtime_version() == "2.1.0"
    attention = _mobile_operators.operators()["aten::scaled_dot_product_attention"]
    assert attention[-1] == "Optional[float]", "2.1.0 takes scale, and no enable_gqa"


def test_a_truncated_file_is_told_as_one_that_cannot_be_read(tmp_path: Path) -> None:
    model, artifact = emitted("llama", "fp32", tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactUnreadable, match="the lite interpreter refuses"):
        LiteSession(artifact)("model", prompt(model))


def test_prepacking_takes_an_environment_that_can(tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailable, match="cannot be run"):
        prepack(str(tmp_path / "python"), tmp_path / FILE, tmp_path / "out.ptl")
    with pytest.raises(TargetUnavailable, match="no program"):
        TorchScriptLite(prepack=str(tmp_path / "python")).require(None)
    with pytest.raises(UsageError, match="prepack"):
        TorchScriptLite(prepack="python").passes("int8")
