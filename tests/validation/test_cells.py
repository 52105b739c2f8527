from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calque.artifact import NOT_RUN
from calque.errors import ArtifactUnreadable
from calque.validation.cells import ordered, read_artifact, read_cells
from tests.calque.artifact_folder import PASSED
from tests.report_folder import REPORT, UNSUPPORTED, scenario, write_failed, write_matrix, write_report


def test_an_artifact_that_passed_says_how_far_it_was_from_its_limit(tmp_path: Path) -> None:
    cell = read_artifact(write_report(tmp_path / "quill"))
    assert (cell.name, cell.status, cell.worst_sigma, cell.limit, cell.seconds) == ("quill", "passed", 6.1e-6, 7e-5, 4.0)
    assert cell.title == "builtin:quill → onnxruntime, fp32"
    assert [row["name"] for row in cell.scenarios] == ["too-long", "single-prompt", "ragged-left"]
    assert cell.findings == []


def test_a_rejected_artifact_says_where_it_diverges_and_not_what_its_rows_say(tmp_path: Path) -> None:
    cell = read_artifact(write_failed(tmp_path / "quill.rejected"))
    assert cell.status == "failed"
    assert cell.findings == ["ragged-left first diverges at stage 'cache_dynamic', layer 1 value: 3.2e-02 σ"]
    assert cell.scenarios[0]["name"] == "ragged-left"


def test_a_check_that_failed_without_a_failed_row_is_a_finding(tmp_path: Path) -> None:
    proof = replace(PASSED, build=replace(PASSED.build, status="failed", reason="the builder refused it"))
    cell = read_artifact(write_report(tmp_path / "quill", proof=proof))
    assert (cell.status, cell.findings) == ("failed", ["build: the builder refused it"])


def test_an_artifact_of_which_nothing_was_proved_is_skipped(tmp_path: Path) -> None:
    assert read_artifact(write_report(tmp_path / "quill", proof=replace(PASSED, numerics=NOT_RUN))).status == "skipped"


def test_a_run_over_many_gives_each_cell_its_own_artifact(tmp_path: Path) -> None:
    write_report(tmp_path / "good")
    # The older artifact of a cell that now failed is not what failed.
    write_report(tmp_path / "bad", replace(REPORT, scenarios=(scenario("older", 1.0),)))
    write_failed(tmp_path / "bad.rejected")
    rows: list[dict[str, Any]] = [
        {"name": "good", "folder": "good", "worst_sigma": 6.1e-6, "seconds": 9.0},
        UNSUPPORTED,
        {"name": "bad", "folder": str(tmp_path / "bad"), "status": "failed", "exit_code": 3, "error": None},
        {"name": "left out", "status": "skipped", "error": None},
    ]
    cells = read_cells([write_matrix(tmp_path, *rows)])
    assert [(cell.name, cell.status, cell.folder) for cell in cells] == [
        ("good", "passed", tmp_path / "good"),
        ("llama-int4", "failed", None),
        ("bad", "failed", tmp_path / "bad.rejected"),
        ("left out", "skipped", None),
    ]
    assert [cell.worst_sigma for cell in cells] == [6.1e-6, None, 3.2e-2, None]
    assert [cell.seconds for cell in cells] == [9.0, 2.0, 4.0, None]
    assert cells[1].error is not None
    assert (cells[1].error["type"], cells[1].error["exit_code"], cells[1].title) == ("Unsupported", 4, "llama-int4")
    assert [cell.name for cell in ordered(cells)] == ["llama-int4", "bad", "left out", "good"]


@pytest.mark.parametrize("damage", ["no folder", "no report"])
def test_a_cell_that_passed_and_has_no_sound_artifact_counts_as_failed(tmp_path: Path, damage: str) -> None:
    if damage == "no report":
        (write_report(tmp_path / "good") / "report.json").write_text("{")
    [cell] = read_cells([write_matrix(tmp_path, {"name": "good", "folder": "good"})])
    assert cell.status == "failed"
    assert cell.error is not None
    assert cell.error["type"] == "ArtifactUnreadable"


def test_every_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(ArtifactUnreadable) as caught:
        read_cells([tmp_path / "a", write_report(tmp_path / "good"), tmp_path / "b"])
    assert [line.split()[0] for line in caught.value.where] == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 2, "cells": []}', '{"schema": 1, "cells": [{"status": "odd"}]}'])
def test_a_matrix_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "matrix.json").write_text(text)
    with pytest.raises(ArtifactUnreadable, match=r"matrix\.json"):
        read_cells([tmp_path])


@pytest.mark.parametrize("row", [{}, "text", {"name": "a", "limit": 1.0, "status": "odd"}])
def test_a_row_that_is_no_scenario_is_refused(tmp_path: Path, row: object) -> None:
    folder = write_report(tmp_path / "quill")
    (folder / "report.json").write_text(json.dumps({**REPORT.data(), "scenarios": [row]}))
    with pytest.raises(ArtifactUnreadable, match="scenario"):
        read_artifact(folder)
