"""Converts checkpoints with Calque and sets what `--plan` predicted beside what was measured: memory, disk, size of the artifact.

``python -m benchmarks.memory.run [--cases S-fp32 …] [--work DIR]``, from the repository root. Checkpoints are made and kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.conversion.environments import versions
from benchmarks.conversion.measure import measure
from benchmarks.conversion.records import last_line, read_stages, size, stage_peaks
from benchmarks.conversion.run import machine, prepare, remove
from benchmarks.conversion.tables import markdown
from benchmarks.conversion.tools import environment
from benchmarks.memory.tables import NOTES, TITLE, table

ROOT = Path(__file__).parents[2]
INTERVAL_S = 0.25
INT4 = ("--precision", "int4", "--set", "padding=right")


@dataclass(frozen=True)
class Case:
    """A shape, and what its conversion is asked for."""

    shape: str
    options: tuple[str, ...] = ()


CASES = {
    "S-fp32": Case("S"),
    "S-fp16": Case("S", ("--precision", "fp16")),
    "S-int8": Case("S", ("--precision", "int8")),
    "S-int4-1GB": Case("S", (*INT4, "--max-memory", "1GB")),
    "M-fp32": Case("M"),
    "M-fp16": Case("M", ("--precision", "fp16")),
    "M-int4": Case("M", INT4),
    "L-int4-3GB": Case("L", (*INT4, "--max-memory", "3GB")),
    "L-int4-1.5GB": Case("L", (*INT4, "--max-memory", "1.5GB")),
    "XL-int4-3GB": Case("XL", (*INT4, "--max-memory", "3GB")),
}


@dataclass(frozen=True)
class Run:
    """One conversion: what was predicted and what was measured, bytes by name; of one that failed, what it said."""

    case: str
    command: str
    predicted: dict[str, int]
    measured: dict[str, int]
    by_blocks: bool
    wall_s: float
    cpu_s: float
    message: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results; 1 where a conversion failed."""
    args = parse(arguments)
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    found = earlier(args.results / "results.json")
    for name in args.cases:
        prepare(CASES[name].shape, work, Path(sys.executable))
        found[name] = run(name, work)
        print(table([found[name]]), file=sys.stderr, flush=True)
        write([found[case] for case in CASES if case in found], args.results)
    print(table([found[name] for name in args.cases]))
    return int(any(found[name].message for name in args.cases))


def write(runs: Sequence[Run], folder: Path) -> None:
    """The folder holds results.json and results.md, without a path or name of this machine."""
    results: dict[str, Any] = {
        "schema": 1,
        "command": f"python -m benchmarks.memory.run --cases {' '.join(one.case for one in runs)}",
        "machine": machine(),
        "tools": {"Calque": {"command": "calque convert --target onnxruntime", "versions": versions(Path(sys.executable))}},
        "runs": [asdict(one) for one in runs],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(results, [table(runs)], TITLE, NOTES), encoding="utf-8")


def earlier(path: Path) -> dict[str, Run]:
    """Return what was measured before, by case: the largest is not measured again for the sake of the others."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return {one["case"]: Run(**one) for one in runs}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what is converted, and how")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "conversion", metavar="DIR", help="for checkpoints and artifacts")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, metavar="DIR", help="where results.json and .md go")
    return parser.parse_args(arguments)


def run(name: str, work: Path) -> Run:
    """Return what one conversion took beside its plan; nothing of it is left but its log."""
    case, folder, log = CASES[name], work / f"memory-{name}", work / f"memory-{name}.log"
    out = folder / "artifact"
    remove(folder)
    folder.mkdir()
    shown = f"calque convert --target onnxruntime {case.shape} {' '.join(case.options)}".rstrip()
    command = [sys.executable, "-m", "calque.cli", "convert", "--target", "onnxruntime", str(work / f"model-{case.shape}"), *case.options]
    variables = {**environment(work), "PYTHONPATH": str(ROOT)}
    said = subprocess.run([*command, "--plan", "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=variables, cwd=work)
    if said.returncode:
        return Run(name, shown, {}, {}, False, 0.0, 0.0, said.stderr.strip().splitlines()[-1])
    plan = json.loads(said.stdout)
    disk = Disk(folder)
    taken = measure([*command, "-o", str(out)], log, variables, work)
    measured = {"disk": disk.most(), "peak": taken.peak_rss_bytes, "artifact": size(out), **stage_peaks(read_stages(out))}
    message = last_line(log, {work: "WORK", ROOT: "ROOT"}) if taken.exit_code else None
    remove(folder)
    return Run(name, shown, predicted(plan), measured, plan["proof_by_blocks"], taken.wall_s, taken.cpu_s, message)


def predicted(plan: dict[str, Any]) -> dict[str, int]:
    """Return what the plan says, by the names of what is measured."""
    peaks = plan["peak_memory_bytes"]
    proof = peaks["prove_by_blocks" if plan["proof_by_blocks"] else "prove"]
    found = {"convert": peaks["convert"], "prove": proof, "peak": max(peaks["convert"], proof)}
    return {**found, "artifact": plan["artifact_bytes"], "disk": plan["disk_bytes"]}


class Disk:
    """How many bytes of the disk a folder takes at most from now on, with files in it that have no name any more but are open."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.largest = folder, 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def most(self) -> int:
        """Return the bytes, and watch no longer."""
        self.ended.set()
        self.thread.join()
        return self.largest

    def _watch(self) -> None:
        while not self.ended.wait(INTERVAL_S):
            self.largest = max(self.largest, sum(dict(self._sizes()).values()))

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """Yield inode and bytes of each file, of some twice."""
        files = [Path(place, name) for place, _, names in os.walk(self.folder) for name in names]
        for path in (*files, *Path("/proc").glob("[0-9]*/fd/*")):
            with suppress(OSError):  # it is gone meanwhile, or another user's
                nameless = path.is_symlink() and (link := os.readlink(path)).startswith(f"{self.folder}/") and link.endswith("(deleted)")
                if nameless or not path.is_symlink():
                    found = path.stat()
                    yield found.st_ino, found.st_blocks * 512


if __name__ == "__main__":
    sys.exit(main())
