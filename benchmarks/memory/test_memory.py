"""What is set beside each other is of the same thing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.memory.run import CASES, Case, Disk, Run, main, predicted
from benchmarks.memory.tables import table

PLAN = {
    "peak_memory_bytes": {"convert": 10, "prove": 40, "prove_by_blocks": 20},
    "proof_by_blocks": False,
    "artifact_bytes": 5,
    "disk_bytes": 7,
}


def test_prediction_of_the_proof_is_of_the_kind_that_will_run() -> None:
    assert predicted(PLAN) == {"convert": 10, "prove": 40, "peak": 40, "artifact": 5, "disk": 7}
    assert predicted({**PLAN, "proof_by_blocks": True})["peak"] == 20


def test_disk_counts_files_that_have_no_name_any_more(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    path = tmp_path / "file"
    with path.open("wb") as file:
        path.unlink()
        file.write(os.urandom(64 << 20))
        file.flush()
        os.fsync(file.fileno())
        (tmp_path / "named").write_bytes(bytes(1 << 20))
        time.sleep(0.6)
    assert 65 << 20 <= disk.most() < 66 << 20


def test_table_says_by_how_much_a_prediction_is_high_or_what_failed() -> None:
    sizes = {"convert": 10**8, "prove": 2 * 10**8, "peak": 3 * 10**8, "artifact": 10**7, "disk": 10**7}
    done = Run("S-fp32", "calque convert S", sizes, {**sizes, "peak": 4 * 10**8}, by_blocks=True, wall_s=2.0, cpu_s=1.0)
    failed = Run("M-fp32", "calque convert M", {}, {}, by_blocks=False, wall_s=0.0, cpu_s=0.0, message="no memory")
    text = table([done, failed])
    assert "| `calque convert S` | blocks | 100 / 100, +0 % | 200 / 200, +0 % | 300 / 400, -25 % |" in text
    assert "failed: no memory" in text


def test_every_case_has_a_name_of_its_shape() -> None:
    assert all(name.split("-")[0] == case.shape for name, case in CASES.items())


def test_smallest_shape_is_measured_from_plan_to_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "XS-fp32", Case("XS"))
    assert main(["--cases", "XS-fp32", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| `calque convert --target onnxruntime XS` | whole |" in text
    assert str(tmp_path) not in text
