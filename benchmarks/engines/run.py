"""Converts models for TensorRT, through the whole gate and the builder of TensorRT-RTX, and writes down what each engine took.

``python -m benchmarks.engines.run [--models llama …] [--precisions fp16 …] [--work DIR]``, from the repository root, with
`tensorrt-rtx` installed. Nothing is run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.conversion.environments import versions
from benchmarks.conversion.run import machine
from benchmarks.conversion.tables import markdown
from benchmarks.engines.models import MODELS, Model
from calque.console import size
from calque.validation.compare import EXACT

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
COMMAND = "python -m benchmarks.engines.run"
# The own text of the repository: enough to measure ranges of activations on.
TEXT = ROOT / "README.md"
PRECISIONS = {"fp16": [], "int8": [], "int8-static": ["--calibration", str(TEXT)], "int4": [], "fp8": [],
              "fp8, calibrated": ["--calibration", str(TEXT)], "fp16, attention=trt": ["--set", "attention=trt"]}  # fmt: skip
GENERATORS_ALONE = ("fp16, attention=trt",)
UNCALIBRATED = ("vit",)
HEAD = ("model", "precision", "proved by", "worst, σ", "rounded, σ", "build", "build s", "engine", "builder's memory",
        "whole conversion s")  # fmt: skip

TITLE = "Engines built on the CPU"
NOTES = (
    "Each model went through the whole gate on the exact `model.onnx` in ONNX Runtime, and was then built by TensorRT-RTX on the CPU; no "
    "engine was run. Models are small ones of their type with random weights, MiniLM-L6 and S of the sizes that were released, quill the "
    "built-in one. Caches have 64 slots, that of S 512. Where activations are rounded, *worst* is that of the same file without rounding, "
    "*rounded* with it."
)

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert each and write the results; 1 where one was not built."""
    args = parse(arguments)
    asked = [(name, precision) for name in args.models for precision in args.precisions if not refused(name, precision)]
    rows = [row for row in earlier(args.results) if (row["model"], row["precision"]) not in asked]
    for name, precision in asked:
        row = {"model": name, "precision": precision, **built(MODELS[name], precision, args.work)}
        print(f"{name}, {precision}: {row.get('build')} {row.get('error', '')}", file=sys.stderr, flush=True)
        rows.append(row)
    command = "calque convert MODEL --target tensorrt --precision PRECISION"
    order = [(name, precision) for name in MODELS for precision in PRECISIONS]
    rows.sort(key=lambda row: order.index((row["model"], row["precision"])))
    tools = {"Calque": {"command": command, "versions": versions(Path(sys.executable))}}
    results = {"schema": 1, "command": COMMAND, "machine": machine(), "tools": tools, "rows": rows}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (args.results / "results.md").write_text(page(results), encoding="utf-8")
    return int(any(row["build"] != "passed" for row in rows))


def earlier(results: Path) -> list[Row]:
    """Return the rows of an earlier run; none where there was none. What is not asked for keeps its row."""
    file = results / "results.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "engines", metavar="DIR", help="where artifacts are made")
    parser.add_argument("--results", type=Path, default=HERE, metavar="DIR", help="where results.json and results.md go")
    return parser.parse_args(arguments)


def refused(model: str, precision: str) -> bool:
    """Return whether a model has no such precision: images have no text to be measured on, and only slots have lengths."""
    calibrated = "--calibration" in PRECISIONS[precision]
    return (precision in GENERATORS_ALONE and not MODELS[model].slots) or (calibrated and model in UNCALIBRATED)


def built(model: Model, precision: str, work: Path) -> Row:
    """Return what one conversion came to."""
    folder, out = work / "model", work / "out"
    for place in (folder, out, out.with_name("out.rejected")):
        shutil.rmtree(place, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    slots = ["--max-length", str(model.slots)] if model.slots else []
    asked = ["--target", "tensorrt", "--precision", precision.split(",")[0], *PRECISIONS[precision], *slots]
    command = [sys.executable, "-c", "import sys; from calque.cli import main; sys.exit(main())", "convert", *model.source(folder), *asked]
    done = subprocess.run([*command, "--json", "-o", str(out)], capture_output=True, text=True, check=False, cwd=ROOT)
    said = json.loads(done.stdout) if done.stdout.strip() else {"error": {"what": done.stderr.strip().splitlines()[-1:]}}
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        return {"build": "failed", "error": said["error"]["what"]}
    proof, report = said["proof"], said["report"]
    return {
        "by": proof["numerics"]["by"],
        **worst(report["scenarios"]),
        "scenarios": len(report["scenarios"]),
        "build": proof["build"]["status"],
        "build_seconds": report["build"]["build_seconds"],
        "plan_bytes": report["build"]["plan_bytes"],
        "peak_rss_bytes": report["build"]["peak_rss_bytes"],
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
    }


def worst(rows: Sequence[Row]) -> Row:
    """Return the largest difference, in σ: where activations are rounded, that of the same file without, and that with."""
    measured = [row for row in rows if row["worst_sigma"] is not None]
    exact = [row["worst_sigma"] for row in measured if row["name"].endswith(EXACT)]
    plain = max(row["worst_sigma"] for row in measured if not row["name"].endswith(EXACT))
    return {"worst_sigma": max(exact), "rounded_sigma": plain} if exact else {"worst_sigma": plain, "rounded_sigma": None}


def page(results: Row) -> str:
    """Return the page of all rows."""
    cells = [HEAD, ("---",) * len(HEAD), *map(_cells, results["rows"])]
    return markdown(results, ["\n".join(f"| {' | '.join(row)} |" for row in cells), ""], TITLE, NOTES)


def _cells(row: Row) -> list[str]:
    if "error" in row:
        return [row["model"], row["precision"], "", "", "", f"{row['build']}: {row['error']}", "", "", "", ""]
    figures = [f"{row['build_seconds']:.1f}", size(row["plan_bytes"]), size(row["peak_rss_bytes"]), f"{row['seconds']:.0f}"]
    rounded = "" if row["rounded_sigma"] is None else f"{row['rounded_sigma']:.1e}"
    return [row["model"], row["precision"], row["by"], f"{row['worst_sigma']:.1e}", rounded, row["build"], *figures]


if __name__ == "__main__":
    sys.exit(main())
