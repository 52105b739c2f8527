"""The fastest of several: candidates fail by themselves, figures decide, the artifact is the picked target's and says what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import calque
from calque import fastest, pipeline, targets
from calque.artifact import Artifact
from calque.bench import Bench
from calque.console import report_text
from calque.errors import ParityFailed, SourceUnreadable, UsageError
from calque.recipe import Recipe
from calque.runtime import open_session
from calque.targets.cpu import Cpu

DIMS: Any = {"sequence_length": [1, 24, 64]}
PARITY: Any = {"scenarios": ["single-prompt", "batch-2"]}
QUILL = Recipe(model="builtin:quill", target="cpu", parity=PARITY, dims=DIMS)


def figures(first: float, step: float) -> dict[str, Any]:
    spread = {"min": first, "median": first, "max": first}
    return {"ttft_ms": spread, "tpot_ms": {key: step for key in spread}}


@pytest.mark.parametrize(("judged_by", "cost"), [("answer", 10 + 9 * 2.0), ("prompt", 10.0), ("step", 2.0)])
def test_what_is_compared_is_what_was_asked_for(judged_by: Any, cost: float) -> None:
    assert Cpu(judged_by=judged_by).cost(figures(10, 2), 10) == cost
    assert Cpu(judged_by=judged_by).cost({"call_ms": {"p50": 3.5}}, 10) == 3.5


def test_candidates_are_those_that_have_the_precision() -> None:
    assert Cpu(candidates=("onnxruntime",)).candidates_of("int4") == ("onnxruntime",)
    with pytest.raises(UsageError, match="no candidate has the precision fp8"):
        Cpu(candidates=("onnxruntime",)).candidates_of("fp8")


@pytest.mark.parametrize("options", [{"candidates": []}, {"candidates": ["onnxruntime", "onnxruntime"]}, {"new_tokens": 1}, {"rounds": 0}])
def test_options_that_measure_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        targets.make("cpu", options)


def converting(failing: dict[str, Exception]) -> Callable[..., Artifact]:
    """Converts for ONNX Runtime whatever the candidate, but where it has to fail."""

    def convert(recipe: Recipe, out: Path, **keywords: Any) -> Artifact:
        if recipe.target in failing:
            raise failing[recipe.target]
        assert "rounds" not in recipe.options, "options of the target that chooses are no candidate's"
        return pipeline.convert(recipe.model_copy(update={"target": "onnxruntime"}), out, **keywords)

    return convert


@pytest.fixture
def benched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Path], Bench]]:
    """Nothing is measured: later artifacts are said to be faster. What was asked for is kept."""
    asked: list[tuple[list[Path], Bench]] = []

    def bench(folders: list[Path], loop: Bench, announce: Any) -> dict[str, Any]:
        asked.append((folders, loop))
        rows = [{"peak_rss_bytes": 1, "lengths": [figures(10 - place, 2)]} for place in range(len(folders))]
        settings = {"threads": 0, "rounds": loop.rounds, "batch_size": loop.batch_size, "prompt_tokens": list(loop.prompt_tokens)}
        return {"kind": "generator", "artifacts": rows, "notes": [], **settings}

    monkeypatch.setattr(fastest, "bench", bench)
    return asked


def test_the_fastest_is_taken_and_the_report_says_by_what(tmp_path: Path, benched: list[tuple[list[Path], Bench]]) -> None:
    out = tmp_path / "quill"
    recipe = QUILL.model_copy(update={"options": {"rounds": 2}})
    target = Cpu(candidates=("onnxruntime", "torchscript", "aotinductor"), rounds=2)
    convert = converting({"aotinductor": ParityFailed("it is wrong", ["here"], "")})
    artifact = fastest.convert_fastest(recipe, target, out, convert, force=False, progress=lambda stage: None)
    [(folders, loop)] = benched
    assert (len(folders), loop.prompt_tokens, loop.batch_size, loop.rounds) == (2, (24,), 1, 2)
    assert artifact.target == "onnxruntime"  # what stands in for the candidate that was the fastest
    assert artifact.damaged_files() == []
    report = json.loads((out / "report.json").read_text())
    assert report["choice"]["picked"] == "torchscript"
    assert "torchscript was the fastest here" in report["notes"][-1]
    assert "aotinductor was left out: it is wrong; here" in report["notes"][-1]
    shown = report_text(report)
    assert "torchscript (picked)" in shown
    assert "it is wrong; here" in shown
    assert [path.name for path in tmp_path.iterdir() if path.name != "quill"] == [".quill.calque-lock"] or len(
        list(tmp_path.iterdir())
    ) == 1
    open_session(out)


def test_where_all_fail_every_reason_is_said(tmp_path: Path) -> None:
    failing: dict[str, Exception] = {"onnxruntime": ParityFailed("wrong", ["a"], ""), "torchscript": ParityFailed("wrong too", ["b"], "")}
    target = Cpu(candidates=("onnxruntime", "torchscript"))
    with pytest.raises(ParityFailed, match="no candidate could be converted") as caught:
        fastest.convert_fastest(QUILL, target, tmp_path / "quill", converting(failing), force=False, progress=lambda stage: None)
    assert "torchscript: wrong too; b" in str(caught.value)
    failing = {"onnxruntime": SourceUnreadable("no model there")}
    with pytest.raises(SourceUnreadable, match="no model"):
        fastest.convert_fastest(QUILL, target, tmp_path / "quill", converting(failing), force=False, progress=lambda stage: None)
    assert not (tmp_path / "quill").exists()


@pytest.mark.slow
def test_it_measures_and_picks(tmp_path: Path) -> None:
    options = {"candidates": ["onnxruntime", "torchscript"], "new_tokens": 8, "rounds": 1}
    artifact = calque.convert(QUILL.model_copy(update={"options": options}), tmp_path / "quill")
    choice = json.loads((tmp_path / "quill" / "report.json").read_text())["choice"]
    assert {row["target"] for row in choice["candidates"] if "cost_ms" in row} == {"onnxruntime", "torchscript"}
    assert artifact.target == choice["picked"] == min(choice["candidates"], key=lambda row: row["cost_ms"])["target"]
