"""Several conversions in one run: what each cell comes to, and what matrix.json says at every moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calque import matrix
from calque.errors import ParityFailed, Unsupported, UsageError
from calque.matrix import MATRIX, Outcome, check_parent, exit_code, run
from calque.recipe import Recipe
from calque.validation import cells
from tests.calque.artifact_folder import write_proved_artifact
from tests.report_folder import write_failed, write_report

RECIPE = Recipe.of({"target": "onnxruntime", "matrix": {"model": ["org/a", "org/b", "org/c"]}})
NAMES = ["a-onnxruntime-fp32", "b-onnxruntime-fp32", "c-onnxruntime-fp32"]
KEYS = ["name", "folder", "status", "exit_code", "error", "seconds", "worst_sigma"]


class Conversions:
    """Converts into real folders; a model that ``failing`` names raises, one that ``there`` names is skipped."""

    def __init__(self, parent: Path, failing: dict[str, BaseException], there: tuple[str, ...] = ()) -> None:
        self.parent, self.failing, self.there = parent, failing, there
        self.seen: list[list[dict[str, Any]]] = []
        self.ended: list[tuple[Outcome, Exception | None]] = []

    def __call__(self, recipe: Recipe, out: Path) -> matrix.Status:
        self.seen.append(read(self.parent))
        error = self.failing.get(recipe.model)
        if isinstance(error, ParityFailed):
            write_failed(out.with_name(f"{out.name}.rejected"))
        if error:
            raise error
        write_report(out)
        return "skipped" if recipe.model in self.there else "passed"

    def run(self) -> list[Outcome]:
        return run(RECIPE.expand(), self.parent, self, lambda outcome, failure: self.ended.append((outcome, failure)))


def read(parent: Path) -> list[dict[str, Any]]:
    data = json.loads((parent / MATRIX).read_text())
    assert data["schema"] == 1
    assert [list(cell) for cell in data["cells"]] == [KEYS] * len(data["cells"])
    found: list[dict[str, Any]] = data["cells"]
    return found


def test_one_cell_failing_does_not_stop_the_others(tmp_path: Path) -> None:
    failure = Unsupported("no such operator", ["node_1"], "upgrade")
    conversions = Conversions(tmp_path / "new" / "out", {"org/b": failure})
    outcomes = conversions.run()
    assert [(outcome.name, outcome.status, outcome.exit_code) for outcome in outcomes] == list(
        zip(NAMES, ("passed", "failed", "passed"), (0, 4, 0), strict=True)
    )
    assert exit_code(outcomes) == 4
    assert [error for _, error in conversions.ended] == [None, failure, None]
    assert sorted(path.name for path in conversions.parent.iterdir()) == [NAMES[0], NAMES[2], MATRIX]


def test_the_file_is_true_after_every_cell(tmp_path: Path) -> None:
    (tmp_path / MATRIX).write_text('{"schema": 1, "cells": [{"name": "of an earlier run"}]}')
    conversions = Conversions(tmp_path, {"org/a": Unsupported("x", ["y"], "z")}, there=("org/c",))
    conversions.run()
    assert [[cell["name"] for cell in cells] for cells in conversions.seen] == [[], NAMES[:1], NAMES[:2]]
    failed, passed, skipped = read(tmp_path)
    assert failed["error"] == {"type": "Unsupported", "what": "x", "where": ["y"], "fix": "z"}
    assert (failed["folder"], failed["worst_sigma"]) == (None, None)
    assert (passed["folder"], passed["worst_sigma"], passed["error"]) == (NAMES[1], 6.1e-6, None)
    assert (skipped["status"], skipped["exit_code"], skipped["worst_sigma"]) == ("skipped", 0, 6.1e-6)
    assert all(cell["seconds"] >= 0 for cell in (failed, passed, skipped))


def test_a_failed_proof_names_the_rejected_folder(tmp_path: Path) -> None:
    [failed, *_] = Conversions(tmp_path, {"org/a": ParityFailed("numerics failed")}).run()
    assert (failed.folder, failed.exit_code, failed.worst_sigma) == (f"{NAMES[0]}.rejected", 3, 3.2e-2)


def test_another_failure_names_no_rejected_folder_of_an_earlier_run(tmp_path: Path) -> None:
    write_proved_artifact(tmp_path / f"{NAMES[0]}.rejected")
    [failed, *_] = Conversions(tmp_path, {"org/a": Unsupported("x")}).run()
    assert (failed.folder, failed.worst_sigma) == (None, None)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (RuntimeError("first\nsecond"), "RuntimeError", 1),
        (MemoryError(), "WontFit", 6),
        (ModuleNotFoundError("no onnx", name="onnx"), "TargetUnavailable", 5),
    ],
)
def test_what_libraries_raise_is_a_cell_that_failed(tmp_path: Path, error: Exception, kind: str, code: int) -> None:
    failed, *others = Conversions(tmp_path, {"org/a": error}).run()
    assert failed.error is not None
    assert (failed.error["type"], failed.exit_code) == (kind, code)
    assert failed.error["fix"]
    assert [other.status for other in others] == ["passed", "passed"]


def test_an_interrupt_ends_the_run_and_keeps_what_is_done(tmp_path: Path) -> None:
    conversions = Conversions(tmp_path, {"org/b": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        conversions.run()
    assert [cell["name"] for cell in read(tmp_path)] == NAMES[:1]
    assert (tmp_path / NAMES[0] / "manifest.json").is_file()
    assert not (tmp_path / NAMES[2]).exists()


def test_the_exit_code_is_that_of_the_first_failure(tmp_path: Path) -> None:
    assert exit_code(Conversions(tmp_path / "a", {"org/b": MemoryError(), "org/c": Unsupported("x")}).run()) == 6
    assert exit_code(Conversions(tmp_path / "b", {}).run()) == 0


def test_a_report_reads_what_a_run_wrote(tmp_path: Path) -> None:
    Conversions(tmp_path, {"org/a": Unsupported("x"), "org/b": ParityFailed("y")}, there=("org/c",)).run()
    found = cells.read_cells([tmp_path])
    assert cells.MATRIX == MATRIX
    assert cells.SCHEMA == matrix.SCHEMA
    assert [(cell.name, cell.status, bool(cell.manifest)) for cell in found] == list(
        zip(NAMES, ("failed", "failed", "skipped"), (False, True, True), strict=True)
    )


def test_every_output_in_the_way_is_named_before_any_work(tmp_path: Path) -> None:
    write_proved_artifact(tmp_path / NAMES[0])
    (tmp_path / NAMES[1]).mkdir()
    with pytest.raises(UsageError) as caught:
        check_parent(tmp_path, NAMES, replace=False)
    assert [line for line in caught.value.where if "exists already" in line] == list(caught.value.where)
    assert len(caught.value.where) == 2
    assert "--resume" in caught.value.fix
    assert "remove this one yourself" in caught.value.fix, "--resume and --force help against the other alone"
    with pytest.raises(UsageError) as caught:
        check_parent(tmp_path, NAMES, replace=True)
    assert [NAMES[1] in line for line in caught.value.where] == [True]
    check_parent(tmp_path, NAMES[2:], replace=False)


@pytest.mark.parametrize("place", ["artifact", "file", "foreign"])
def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, place: str) -> None:
    parent = tmp_path / "out"
    if place == "artifact":
        write_proved_artifact(parent)
    elif place == "file":
        parent.write_text("mine")
    else:
        parent.mkdir()
        (parent / MATRIX).write_text("[[1, 0], [0, 1]]")
    with pytest.raises(UsageError):
        check_parent(parent, NAMES, replace=True)


def test_a_folder_that_cannot_be_made_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        Conversions(tmp_path / "file" / "out", {}).run()
