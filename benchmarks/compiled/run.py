"""Converts models for the compiled targets through the whole gate, runs each artifact beside the eager model, and writes it down.

``python -m benchmarks.compiled.run [--models llama …] [--targets torchscript …] [--precisions int8 …]``, from the repository root.
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

from benchmarks.compiled.models import LARGE, MODELS
from benchmarks.compiled.timing import PROMPT
from benchmarks.conversion.environments import versions
from benchmarks.conversion.run import machine
from benchmarks.conversion.tables import markdown
from benchmarks.engines.run import worst
from calque.artifact import Artifact
from calque.console import size

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
COMMAND = "python -m benchmarks.compiled.run"
PRECISIONS = {
    "onnxruntime": ("fp32", "int8", "int4"),
    "torchscript": ("fp32", "bf16", "int8"),
    "torchscript-lite": ("fp32", "int8"),
    "aotinductor": ("fp32", "bf16", "int8", "int4"),
    "coreml": ("fp32", "fp16", "int8", "int4"),
}
# How long a row of a model with keys and values may become; of large ones less, as the gate fills every length to its last token.
LONGEST, LONGEST_OF_LARGE = 1024, 256
SERVERS = ("onnxruntime", "torchscript", "aotinductor")
CELLS = [(target, precision) for target, precisions in PRECISIONS.items() for precision in precisions]
HEAD = ("model", "target", "precision", "worst, σ", "rounded, σ", "proved by", "files", "of fp32", "load ms", f"first {PROMPT} ms",
        "× eager", "step ms", "× eager", "conversion s")  # fmt: skip

TITLE = "Compiled targets, executed"
NOTES = (
    "Each artifact went through the whole gate and was then run beside the eager model it came of, in one process, in turn: a prompt of "
    "64 tokens, and 16 steps of one after it; an encoder's calls have 64 tokens, or an image. *× eager* is how many times as fast as "
    "eager that is, in the median of five rounds. *Load* ends with a first small call. *Files* are those with graph and weights. Models "
    "are small ones of their type with random weights, MiniLM-L6, S and M of the sizes that were released, quill the built-in one, and "
    "a Llama of 30M parameters for sizes. Core ML's packages are run by Calque's interpreter of MIL, in numpy, whose times say nothing "
    "of a device. Where activations are rounded, *worst* is that of the same file without rounding where its runtime can do so, "
    "*rounded* with it. A cell that failed has its error. One thread."
)
# Of more, each operator of torch waits for the slowest, which on a machine that does something else is the next time slice.
THREADS = 1
# What lies beside graph and weights.
COMPANIONS = (".json", ".jinja", ".npz", ".cpp", ".txt", "LICENSE", "tokenizer.model")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert and run each and write the results; 1 where one failed."""
    args = parse(arguments)
    asked = [(name, *cell) for name in args.models for cell in cells(name) if cell[0] in args.targets and cell[1] in args.precisions]
    rows = earlier(args.results)
    for name, target, precision in asked:
        rows = [row for row in rows if (row["model"], row["target"], row["precision"]) != (name, target, precision)]
        row = {"model": name, "target": target, "precision": precision, **made(name, target, precision, args.work)}
        print(f"{name}, {target} {precision}: {row.get('error') or row['worst_sigma']}", file=sys.stderr, flush=True)
        rows.append(row)
        write(args.results, rows)
    return int(any("error" in row for row in rows))


def cells(model: str) -> list[tuple[str, str]]:
    """Return the targets and precisions of a model; of a large one those that servers run, at 32, 8 and 4 bits."""
    return [cell for cell in CELLS if model not in LARGE or (cell[0] in SERVERS and cell[1] in ("fp32", "int8", "int4"))]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--targets", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    precisions = tuple(dict.fromkeys(precision for _, precision in CELLS))
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "compiled", metavar="DIR", help="where artifacts are made")
    parser.add_argument("--results", type=Path, default=HERE, metavar="DIR", help="where results.json and results.md go")
    return parser.parse_args(arguments)


def earlier(results: Path) -> list[Row]:
    """Return the rows of an earlier run; none where there was none. What is not asked for keeps its row."""
    file = results / "results.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return rows


def write(folder: Path, rows: list[Row]) -> None:
    """results.json and results.md hold the rows, in order of models and targets."""
    order = [(name, *cell) for name in MODELS for cell in CELLS]
    rows.sort(key=lambda row: order.index((row["model"], row["target"], row["precision"])))
    tools = {
        "Calque": {"command": "calque convert MODEL --target TARGET --precision PRECISION", "versions": versions(Path(sys.executable))}
    }
    results = {"schema": 1, "command": COMMAND, "machine": machine(), "tools": tools, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(page(results), encoding="utf-8")


def made(name: str, target: str, precision: str, work: Path) -> Row:
    """Return what one conversion and its running came to."""
    folder, out = work / "model", work / "out"
    for place in (folder, out, out.with_name("out.rejected")):
        shutil.rmtree(place, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    model = MODELS[name]
    source = model.source(folder)
    longest = ["--max-length", str(LONGEST_OF_LARGE if name in LARGE else LONGEST)] if model.slots else []
    asked = ["--target", target, "--precision", precision, "--threads", str(THREADS), *longest]
    command = [sys.executable, "-c", "import sys; from calque.cli import main; sys.exit(main())", "convert", *source, *asked]
    done = subprocess.run([*command, "--json", "-o", str(out)], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return {"error": failure(done)}
    said = json.loads(done.stdout)
    report, artifact = said["report"], Artifact.read(out)
    row = {
        **worst(report["scenarios"]),
        "by": said["proof"]["numerics"]["by"],
        "bytes": sum(count for name, count in report["sizes"].items() if not name.endswith(COMPANIONS)),
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
    }
    random = "random" if "--random-weights" in source else "trained"
    timing = [sys.executable, "-m", "benchmarks.compiled.timing", str(artifact.folder), source[0], model.task, random, str(THREADS)]
    timed = subprocess.run(timing, capture_output=True, text=True, check=False, cwd=ROOT)
    shutil.rmtree(out, ignore_errors=True)
    return {**row, **(json.loads(timed.stdout.splitlines()[-1]) if timed.returncode == 0 else {"error": failure(timed)})}


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command failed with: its error in JSON, or the last line that it said."""
    try:
        error = json.loads(done.stdout)["error"]
        return "; ".join([error["what"], *error["where"][:2]])
    except (ValueError, KeyError, TypeError):
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def page(results: Row) -> str:
    """Return the page of all rows."""
    wide = {(row["model"], row["target"]): row["bytes"] for row in results["rows"] if row["precision"] == "fp32" and "bytes" in row}
    cells = [HEAD, ("---",) * len(HEAD), *(_cells(row, wide.get((row["model"], row["target"]))) for row in results["rows"])]
    return markdown(results, ["\n".join(f"| {' | '.join(row)} |" for row in cells), ""], TITLE, NOTES)


def _cells(row: Row, wide: int | None) -> list[str]:
    name = [row["model"], row["target"], row["precision"]]
    if "error" in row:
        return [*name, " ".join(row["error"].split()).replace("|", "\\|"), *[""] * (len(HEAD) - 4)]
    rounded = "" if row["rounded_sigma"] is None else f"{row['rounded_sigma']:.1e}"
    share = "" if wide is None else f"{row['bytes'] / wide:.2f}"
    times = [cell for what in ("first_ms", "step_ms") for cell in _beside_eager(row[f"artifact_{what}"], row[f"eager_{what}"])]
    proved = [f"{row['worst_sigma']:.1e}", rounded, row["by"]]
    return [*name, *proved, size(row["bytes"]), share, f"{row['load_ms']:.0f}", *times, f"{row['seconds']:.0f}"]


def _beside_eager(took: float | None, eager: float | None) -> tuple[str, str]:
    """Return milliseconds, and how many times as fast as the eager model that is."""
    return ("", "") if took is None or eager is None else (f"{took:.2f}", f"{eager / took:.1f}")


if __name__ == "__main__":
    sys.exit(main())
