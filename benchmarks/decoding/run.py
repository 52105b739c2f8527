"""Decodes with artifacts of Calque and of its peers in turn and prints how fast each was, with ratios.

``python -m benchmarks.decoding.run [--shapes S M L] [--rounds N] [--work DIR]``, from the repository root. The first run makes
the checkpoints, the peers' environments and the artifacts; they are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.conversion.environments import versions
from benchmarks.conversion.run import add_results, add_shapes, is_there, machine, prepare, publish
from benchmarks.conversion.shapes import SHAPES
from benchmarks.conversion.tables import markdown
from benchmarks.conversion.tools import PEERS
from benchmarks.decoding.artifacts import Entry, discard, ensure, entries
from benchmarks.decoding.rounds import PROMPTS, STEPS, Made, measure
from benchmarks.decoding.tables import NOTES, TITLE, Measured, figures, ratios
from benchmarks.decoding.worker import Failed

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    args = parse(arguments)
    if not (shapes := [shape for shape in args.shapes if not is_there(args, called(args, shape))]):
        return 0
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    chosen = entries(work, args.precision)
    for shape in shapes:
        made, failed = make(chosen, shape, work)  # all of it before anything is measured
        measured = measure(made, shape, args.rounds, args.threads)
        report(args, chosen, shape, replace(measured, failed={**failed, **measured.failed}))
        if shape in args.discard:
            for entry in chosen:
                discard(entry.tool, shape, work)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding.run", description=(__doc__ or "").splitlines()[0])
    add_shapes(parser, "S", "M")
    parser.add_argument("--precision", choices=NOTES, default="fp32", help="of the weights")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, in each of which every artifact runs once")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the runtime, for every artifact")
    parser.add_argument(
        "--discard", nargs="+", choices=SHAPES, default=[], help="shapes whose artifacts are deleted once they are measured"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "conversion",
        metavar="DIR",
        help="for checkpoints and environments, which benchmarks.conversion shares, and artifacts",
    )
    add_results(parser, Path(__file__).parent)
    args = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return args


def make(chosen: Sequence[Entry], shape: str, work: Path) -> tuple[dict[str, Made], dict[str, str]]:
    """Return every artifact by its name, each made if it is not there, and what those tools said that failed."""
    prepare(shape, work, Path(sys.executable))
    made: dict[str, Made] = {}
    failed: dict[str, str] = {}
    for entry in chosen:
        try:
            made[entry.name] = Made(entry, ensure(entry.tool, shape, work))
        except Failed as error:
            failed[entry.name] = str(error)
            print(f"{shape}, {entry.name}: {error}", file=sys.stderr, flush=True)
    return made, failed


def report(args: argparse.Namespace, chosen: Sequence[Entry], name: str, measured: Measured) -> None:
    """Print the tables of one shape; results-SHAPE.json and .md hold them, and no path or name of this machine."""
    shape = SHAPES[name]
    results: dict[str, Any] = {
        "schema": 2,
        "command": shown_command(args, name),
        "machine": machine(),
        "loop": {"threads": args.threads, "steps": STEPS, "prompts": PROMPTS},
        "tools": {one.name: described(one) for one in chosen},
        "shapes": {name: {"shape": asdict(shape), **measured.as_json()}},
    }
    table = f"## {name}: {shape.description}, {args.rounds} × interleaved\n\n{figures(measured)}\n\n{ratios(measured, PEERS)}\n"
    notes = NOTES[args.precision].format(threads=args.threads, steps=STEPS)
    publish(results, markdown(results, [table], TITLE, notes), args.results, called(args, name))
    print(table)


def described(entry: Entry) -> dict[str, Any]:
    """Return how the artifact was made and what its runtime was told."""
    told = {"settings": dict(entry.settings)} if entry.settings else {}
    return {"command": entry.tool.shown, "versions": versions(entry.tool.python), "engine": entry.engine, **told}


def shown_command(args: argparse.Namespace, shape: str) -> str:
    """Return the command that measures the shape again; folders do not change what is measured and are left out."""
    precision = "" if args.precision == "fp32" else f" --precision {args.precision}"
    return f"python -m benchmarks.decoding.run --shapes {shape}{precision} --rounds {args.rounds} --threads {args.threads}"


def called(args: argparse.Namespace, shape: str) -> str:
    """Return what the results of a shape are called: by its name, and the precision where that is not fp32."""
    return shape if args.precision == "fp32" else f"{shape}-{args.precision}"


if __name__ == "__main__":
    sys.exit(main())
