"""The table of engines: which conversions are asked for, and how a row of one that failed reads."""

from __future__ import annotations

from pathlib import Path

from benchmarks.engines.models import MODELS
from benchmarks.engines.run import HEAD, PRECISIONS, page, parse, refused


def test_images_are_not_calibrated_and_lengths_belong_to_slots() -> None:
    """All else is asked for."""
    left = {(model, precision) for model in MODELS for precision in PRECISIONS if refused(model, precision)}
    assert left == {
        ("vit", "int8-static"), ("vit", "fp8, calibrated"), ("vit", "fp16, attention=trt"), ("MiniLM-L6", "fp16, attention=trt"),
    }  # fmt: skip


def test_every_model_leaves_a_config(tmp_path: Path) -> None:
    """The built-in one is named."""
    for name, model in MODELS.items():
        source = model.source(tmp_path / name)
        assert source == ["builtin:quill"] or Path(source[0]).is_file()


def test_a_row_that_failed_says_why() -> None:
    """And one that did not has every figure."""
    figures = {"by": "onnxruntime", "worst_sigma": 0.0123, "rounded_sigma": None, "build": "passed", "build_seconds": 1.25,
               "plan_bytes": 3_000_000, "peak_rss_bytes": 250_000_000, "seconds": 9.0}  # fmt: skip
    rows = [{"model": "llama", "precision": "fp16", **figures}, {"model": "vit", "precision": "fp8", "build": "failed", "error": "no"}]
    machine = {"cpu": "a CPU", "cores": 2, "ram_gb": 24, "os": "Linux", "kernel": "6.1"}
    tools = {"Calque": {"command": "calque", "versions": {"torch": "2.13.0"}}}
    text = page({"command": "run", "machine": machine, "tools": tools, "rows": rows})
    assert "| llama | fp16 | onnxruntime | 1.2e-02 |  | passed | 1.2 | 3 MB | 250 MB | 9 |" in text
    assert "| vit | fp8 |  |  |  | failed: no |  |  |  |  |" in text
    assert text.count("|") == (len(HEAD) + 1) * 4


def test_all_is_measured_unless_it_is_said(tmp_path: Path) -> None:
    """Models and precisions by name."""
    assert parse([]).models == list(MODELS)
    assert parse(["--models", "quill", "--precisions", "int4"]).precisions == ["int4"]
