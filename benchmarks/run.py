"""Measures Calque next to its peers, all of it: conversion, then decoding, of one shape after another, the smallest first.

``python -m benchmarks.run [--shapes S M L] [--work DIR] [--resume]``, from the repository root. What an earlier run made is
kept: environments, checkpoints and artifacts, and with ``--resume`` results as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.conversion import run as conversion
from benchmarks.conversion.shapes import SHAPES
from benchmarks.decoding import run as decoding

HERE = Path(__file__).parent
# Artifacts of the others do not fit on a small disk together.
KEPT = ("XS", "S")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results of each shape; 1 where a tool did not convert."""
    args = parse(arguments)
    failed = 0
    for shape in args.shapes:
        convert, decode = commands(args, shape)
        failed |= conversion.main(convert)
        failed |= decoding.main(decode)
    return failed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["S", "M", "L"], help="measured in this order")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="conversions by each tool")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of decoding")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="that decode")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "conversion", metavar="DIR", help="what is made, and kept")
    parser.add_argument("--results", type=Path, default=HERE, metavar="DIR", help="where conversion/ and decoding/ hold the results")
    parser.add_argument("--resume", action="store_true", help="leave out what has results already")
    return parser.parse_args(arguments)


def commands(args: argparse.Namespace, shape: str) -> tuple[list[str], list[str]]:
    """Return the command lines of the conversion and of the decoding of one shape."""
    resume = ["--resume"] if args.resume else []
    shared = ["--shapes", shape, "--work", str(args.work), *resume]
    convert = ["--repeat", str(args.repeat), "--results", str(args.results / "conversion")]
    decode = ["--rounds", str(args.rounds), "--threads", str(args.threads), "--results", str(args.results / "decoding")]
    discard = [] if shape in KEPT else ["--discard", shape]
    return [*shared, *convert], [*shared, *decode, *discard]


if __name__ == "__main__":
    sys.exit(main())
