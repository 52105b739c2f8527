"""The table of compiled targets: which cells there are, and how rows read."""

from __future__ import annotations

import subprocess
from typing import Any

from benchmarks.compiled.models import MODELS
from benchmarks.compiled.run import CELLS, HEAD, cells, failure, page, parse
from calque import targets

MACHINE = {"cpu": "a CPU", "cores": 2, "ram_gb": 24, "os": "Linux", "kernel": "6.1"}
FIGURES: dict[str, Any] = {
    "worst_sigma": 1.2e-05, "rounded_sigma": None, "by": "torchscript", "bytes": 30_000_000, "seconds": 9.0, "load_ms": 80.0,
    "artifact_first_ms": 5.0, "eager_first_ms": 10.0, "artifact_step_ms": 1.0, "eager_step_ms": 4.0,
}  # fmt: skip


def test_cells_are_precisions_that_targets_have() -> None:
    """All models are asked for unless it is said."""
    assert all(precision in targets.load(target).precisions for target, precision in CELLS)
    assert parse([]).models == list(MODELS)
    assert cells("llama") == CELLS
    assert ("coreml", "fp32") not in cells("S (135M)")
    assert ("aotinductor", "int4") in cells("S (135M)")


def test_rows_show_ratios_and_errors() -> None:
    """An encoder has no steps."""
    rows = [
        {"model": "llama", "target": "torchscript", "precision": "fp32", **FIGURES},
        {"model": "llama", "target": "torchscript", "precision": "int8", **FIGURES, "bytes": 7_500_000, "rounded_sigma": 0.1},
        {"model": "vit", "target": "coreml", "precision": "fp32", **FIGURES, "artifact_step_ms": None, "eager_step_ms": None},
        {"model": "vit", "target": "coreml", "precision": "int4", "error": "no | such"},
    ]
    tools = {"Calque": {"command": "calque", "versions": {"torch": "2.13.0"}}}
    text = page({"command": "run", "machine": MACHINE, "tools": tools, "rows": rows})
    assert "| llama | torchscript | fp32 | 1.2e-05 |  | torchscript | 30 MB | 1.00 | 80 | 5.00 | 2.0 | 1.00 | 4.0 | 9 |" in text
    assert "| 1.0e-01 | torchscript | 7.5 MB | 0.25 |" in text
    assert "| vit | coreml | fp32 |" in text
    assert "| no \\| such |" in text
    assert text.count("|") - text.count("\\|") == (len(HEAD) + 1) * 6


def test_failures_are_told_by_their_error() -> None:
    """Or by the last line that was said."""
    said = '{"error": {"what": "cannot", "where": ["a", "b", "c"], "fix": ""}}'
    assert failure(subprocess.CompletedProcess([], 4, said, "")) == "cannot; a; b"
    assert failure(subprocess.CompletedProcess([], 1, "", "one\ntwo\n")) == "two"
    assert failure(subprocess.CompletedProcess([], -11, "", "")) == "exit code -11"
