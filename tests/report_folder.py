"""Folders with a report to render, made by hand: one that passed, one that failed, one whose every text is hostile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from calque.artifact import Check, Proof
from calque.stages import Stage
from calque.validation.report import Report
from tests.calque.artifact_folder import PASSED, write_proved_artifact

HOSTILE = "<script>alert('x')</script>\"'&|`*_[a](http://b)\x1b[31m\x00"
FAILED = Proof(Check("failed", "onnxruntime", "1 of 3 scenarios failed"), Check("passed", "onnxruntime"), Check("passed", "onnxruntime"))


def scenario(name: str, worst: float | None = 5.4e-6, **fields: Any) -> dict[str, Any]:
    row = {
        "name": name, "rows": 3, "positions": 44, "worst_sigma": worst, "mean_sigma": None, "limit": 7e-5, "top1_agree": 1.0,
        "near_ties": [], "status": "passed", "reason": None, "seconds": 0.25,
    }  # fmt: skip
    return {**row, **fields}


def layer(number: int, kind: str, worst: float | None) -> dict[str, Any]:
    return {"layer": number, "kind": kind, "worst_sigma": worst, "limit": 7e-5, "scenario": "ragged-left"}


REPORT = Report(
    scenarios=(
        scenario("single-prompt", near_ties=[{"row": 0, "position": 4, "margin_sigma": 2e-6}]),
        scenario("ragged-left", 6.1e-6),
        scenario("too-long", None, status="not_run", reason="needs rows of 9000 tokens"),
    ),
    stages=(Stage("trace", 3.25, 409_000_000), Stage("prove", 0.75, 547_000_000)),
    sizes={"model.onnx": 5},
    source={
        "id": "builtin:quill", "revision": None, "sha256": "0123", "model_type": "llama", "task": "text-generation-with-past",
        "parameters": 4_590_848, "dtype": "bfloat16",
    },
    target="onnxruntime",
    precision="fp32",
    limits={"padding": "right", "batched_chunk": True, "max_length": 4096, "recompute_at": 2048},
    passes=({"name": "transpose_linear", "count": 42, "skipped": [["lm_head.weight", "tied"]]},),
    weights=(
        {"name": "embeddings", "layer": None, "bytes": 4_000_000, "parameters": 1_000_000},
        {"name": "model.layers.0", "layer": 0, "bytes": 2_000_000, "parameters": 500_000},
    ),
    layers=(layer(0, "key", 2e-6), layer(0, "value", 3e-6), layer(1, "key", 2.5e-6), layer(1, "value", 4e-6)),
    notes=("a runtime does not know this type",),
)  # fmt: skip


def write_report(folder: Path, report: Report = REPORT, proof: Proof = PASSED, **manifest: Any) -> Path:
    """``folder`` is an artifact with that report and proof, some of its manifest replaced."""
    artifact = write_proved_artifact(folder, proof)
    report.write(folder)
    replace(artifact, **manifest).write_manifest()
    return folder


def write_failed(folder: Path) -> Path:
    row = scenario("ragged-left", 3.2e-2, status="failed", reason="row 1, position 3 (prefill): 3.2e-02 σ, limit 7.0e-05 σ")
    failures = ("ragged-left first diverges at stage 'cache_dynamic', layer 1 value: 3.2e-02 σ", f"ragged-left: {row['reason']}")
    layers = (*REPORT.layers[:3], layer(1, "value", None))
    report = replace(REPORT, scenarios=(REPORT.scenarios[0], row, REPORT.scenarios[2]), failures=failures, layers=layers)
    return write_report(folder, report, FAILED)


def write_hostile(folder: Path) -> Path:
    report = replace(
        REPORT,
        scenarios=(scenario(HOSTILE, 1.0, status="failed", reason=HOSTILE), scenario("long", 1e-6, reason="word" * 500)),
        stages=(Stage(HOSTILE, 1.0, 1),),
        sizes={HOSTILE: 1, "x" * 300: 2},
        source={**REPORT.source, "id": HOSTILE, "model_type": HOSTILE, "dtype": HOSTILE, "task": HOSTILE},
        limits={**REPORT.limits, "padding": HOSTILE},
        passes=({"name": HOSTILE, "count": 1, "skipped": [[HOSTILE, HOSTILE]]},),
        weights=({"name": HOSTILE, "layer": None, "bytes": 1, "parameters": 1},),
        layers=(layer(0, "key", 1e-6), layer(0, HOSTILE, 2e-6)),
        failures=(HOSTILE,),
        notes=(HOSTILE, "w" * 400),
    )
    source = {"id": HOSTILE, "revision": HOSTILE, "sha256": HOSTILE}
    proof = replace(FAILED, numerics=Check("failed", HOSTILE, HOSTILE))
    return write_report(folder, report, proof, source=source, target=HOSTILE, tools={HOSTILE: HOSTILE})


def write_matrix(folder: Path, *cells: dict[str, Any]) -> Path:
    """``folder`` holds the matrix.json of those cells; what a cell leaves out is unknown."""
    folder.mkdir(exist_ok=True)
    unknown = {"folder": None, "status": "passed", "exit_code": 0, "error": None, "seconds": None, "worst_sigma": None}
    data = {"schema": 1, "cells": [{**unknown, **cell} for cell in cells]}
    (folder / "matrix.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


UNSUPPORTED = {
    "name": "llama-int4", "status": "failed", "exit_code": 4, "seconds": 2.0,
    "error": {"type": "Unsupported", "what": "onnxruntime cannot express int4", "where": ["node one", "node two"], "fix": "use fp32"},
}  # fmt: skip
