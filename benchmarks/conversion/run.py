"""Converts one checkpoint with Calque and with its peers in turn and prints what each took, with ratios.

``python -m benchmarks.conversion.run [--shapes S] [--repeat N] [--work DIR]``, from the repository root. The first run
makes the checkpoint and the peers' environments; they are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.conversion import checkpoint
from benchmarks.conversion.environments import versions
from benchmarks.conversion.measure import measure
from benchmarks.conversion.records import Record, record
from benchmarks.conversion.shapes import SHAPES
from benchmarks.conversion.tables import NOTES, TITLE, failures, figures, markdown, ratios, rows
from benchmarks.conversion.tools import Tool, environment, tools

ROOT = Path(__file__).parents[2]
WARM_UP = "XS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results; 1 where a tool failed."""
    args = parse(arguments)
    if not (shapes := [shape for shape in args.shapes if not is_there(args, shape)]):
        return 0
    # absolute(), not resolve(): an environment's interpreter is a link, and what it links to is outside the environment.
    work, python = args.work.absolute(), args.calque_python.absolute()
    work.mkdir(parents=True, exist_ok=True)
    (work / "logs").mkdir(exist_ok=True)
    chosen = tools(work, python)
    for shape in dict.fromkeys((WARM_UP, *shapes)):
        prepare(shape, work, python)
    if not args.no_warm_up:
        for tool in chosen:
            convert(tool, WARM_UP, work, "warm-up")
    failed = False
    for shape in shapes:
        runs = rounds(chosen, shape, args.repeat, work)
        report(args, chosen, shape, runs)
        failed |= any(run.exit_code for run in runs)
    return int(failed)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion.run", description=(__doc__ or "").splitlines()[0])
    add_shapes(parser, "S")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds, in each of which every tool converts once")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "conversion", metavar="DIR", help="for checkpoints, environments, outputs"
    )
    parser.add_argument(
        "--calque-python", type=Path, default=Path(sys.executable), metavar="FILE", help="interpreter that has calque[convert]"
    )
    add_results(parser, Path(__file__).parent)
    parser.add_argument("--no-warm-up", action="store_true", help="measure the first conversion of each tool as well")
    args = parser.parse_args(arguments)
    if args.repeat < 1:
        parser.error("--repeat must be 1 or more")
    return args


def add_shapes(parser: argparse.ArgumentParser, *shapes: str) -> None:
    """The command line names shapes; these where it does not."""
    told = "S is SmolLM2-135M, M Qwen2.5-0.5B, L Llama-3.2-1B; XS only tries every tool"
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(shapes), help=told)


def add_results(parser: argparse.ArgumentParser, folder: Path) -> None:
    """The command line names where results go, and whether those that are there stay."""
    parser.add_argument("--results", type=Path, default=folder, metavar="DIR", help="where results-SHAPE.json and .md go")
    parser.add_argument("--resume", action="store_true", help="leave out shapes whose results are there already")


def is_there(args: argparse.Namespace, name: str) -> bool:
    """Return whether the results of that name are left as they are; results-NAME.md is written last."""
    return bool(args.resume and (args.results / f"results-{name}.md").is_file())


def prepare(name: str, work: Path, python: Path) -> None:
    """The checkpoint of the shape is in the work folder."""
    folder = work / f"model-{name}"
    if not checkpoint.is_written(SHAPES[name], folder):
        command = [str(python), "-m", "benchmarks.conversion.checkpoint", name, str(folder)]
        subprocess.run(command, check=True, cwd=ROOT)


def rounds(chosen: Sequence[Tool], shape: str, repeat: int, work: Path) -> list[Record]:
    """Return the records of every round: each tool once in each, one after another, so that a slow minute meets all."""
    return [convert(tool, shape, work, f"round {number} of {repeat}") for number in range(1, repeat + 1) for tool in chosen]


def convert(tool: Tool, shape: str, work: Path, label: str) -> Record:
    """Return the record of one conversion, begun with no earlier output in its way and the checkpoint in the page cache."""
    model, out = work / f"model-{shape}", work / f"out-{shape}-{tool.slug}"
    log = work / "logs" / f"{shape}-{tool.slug}-{label.split(' of ')[0].replace(' ', '-')}.txt"
    remove(out)
    for file in sorted(model.iterdir()):
        subprocess.run(["cat", file], check=True, stdout=subprocess.DEVNULL)
    command = tool.command(model, out, work / "genai-cache")
    taken = record(tool.name, measure(command, log, environment(work), work, tool.mark), out, log, {work: "WORK", ROOT: "ROOT"})
    remove(out)  # measured; the largest would not fit on the disk together
    print(
        f"{shape} {label}, {tool.name}: exit {taken.exit_code}, {taken.whole.wall_s:.1f} s wall, {taken.whole.cpu_s:.1f} s CPU, "
        f"{taken.whole.peak_rss_bytes / 1e6:,.0f} MB; everything else on the machine: {taken.others_cpu_s:.1f} s CPU",
        file=sys.stderr,
        flush=True,
    )
    if taken.exit_code:
        print("\n".join(log.read_text(errors="replace").splitlines()[-5:]), file=sys.stderr)
    return taken


def remove(out: Path) -> None:
    """Nothing lies where a conversion writes; Calque leaves a failed artifact beside it."""
    for old in (out, out.with_name(out.name + ".rejected")):
        shutil.rmtree(old, ignore_errors=True)


def report(args: argparse.Namespace, chosen: Sequence[Tool], name: str, runs: Sequence[Record]) -> None:
    """Print the tables of one shape; results-SHAPE.json and .md hold them, and no path or name of this machine."""
    found, shape = rows(runs), SHAPES[name]
    results: dict[str, Any] = {
        "schema": 1,
        "command": shown_command(args, name),
        "machine": machine(),
        "tools": {tool.name: {"command": tool.shown, "versions": versions(tool.python)} for tool in chosen},
        "shapes": {
            name: {"shape": asdict(shape), "medians": [asdict(row) for row in found], "runs": [run.as_json() for run in runs]},
        },
    }
    parts = (figures(found), ratios(found), failures(runs))
    table = f"## {name}: {shape.description}, {args.repeat} × interleaved\n\n" + "".join(f"{part}\n\n" for part in parts if part)
    publish(results, markdown(results, [table.rstrip("\n") + "\n"], TITLE, NOTES), args.results, name)
    print(table)


def publish(results: dict[str, Any], text: str, folder: Path, shape: str) -> None:
    """The folder holds results-SHAPE.json and results-SHAPE.md."""
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (folder / f"results-{shape}.json").write_text(written, encoding="utf-8")
    (folder / f"results-{shape}.md").write_text(text, encoding="utf-8")


def shown_command(args: argparse.Namespace, shape: str) -> str:
    """Return the command that measures the shape again; folders do not change what is measured and are left out."""
    warm = " --no-warm-up" if args.no_warm_up else ""
    return f"python -m benchmarks.conversion.run --shapes {shape} --repeat {args.repeat}{warm}"


def machine() -> dict[str, Any]:
    """Return what of this machine matters to the figures."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    kernel = ".".join(platform.release().split("-")[0].split(".")[:2])
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "ram_gb": round(memory / 1e9), "os": system, "kernel": kernel}


if __name__ == "__main__":
    sys.exit(main())
