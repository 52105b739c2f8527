"""Decodes with artifacts of Calque and of two peers in turn and prints how fast each was, with ratios.

``python -m benchmarks.decoding.run [--shapes S M] [--rounds N] [--work DIR]``, from the repository root. The first run makes
the checkpoints, the peers' environments and the artifacts; they are kept.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.conversion.environments import versions
from benchmarks.conversion.records import size
from benchmarks.conversion.run import machine, prepare, publish
from benchmarks.conversion.shapes import SHAPES
from benchmarks.conversion.tables import markdown
from benchmarks.conversion.tools import GENAI, OPTIMUM, Tool
from benchmarks.decoding.artifacts import ensure, tools
from benchmarks.decoding.profile import nodes_per_step
from benchmarks.decoding.tables import NOTES, TITLE, Artifact, Measured, Run, figures, first_difference, ratios
from benchmarks.decoding.worker import Worker
from calque.bandwidth import bandwidth

ROOT = Path(__file__).parents[2]
PROMPTS = (128, 512)
STEPS, WARM_UP_STEPS = 64, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the results."""
    args = parse(arguments)
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    makers = tools(work)
    folders = {shape: make(makers, shape, work) for shape in args.shapes}  # all of it before anything is measured
    report(args, makers, {shape: measure(folders[shape], shape, args) for shape in args.shapes})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["S", "M"], help="S is SmolLM2-135M, M Qwen2.5-0.5B; XS only tries every tool"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, in each of which every artifact runs once")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of ONNX Runtime, for every artifact")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "conversion",
        metavar="DIR",
        help="for checkpoints and environments, which benchmarks.conversion shares, and artifacts",
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, metavar="DIR", help="where results.json and .md go")
    args = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return args


def make(makers: Sequence[Tool], shape: str, work: Path) -> dict[str, Path]:
    """Return the folder of every artifact by its name, each made if it is not there."""
    prepare(shape, work, Path(sys.executable))
    return {maker.name: ensure(maker, shape, work) for maker in makers}


def measure(folders: Mapping[str, Path], shape: str, args: argparse.Namespace) -> Measured:
    """Return what the artifacts of one shape took."""
    nodes = {name: nodes_per_step(folder, shape) for name, folder in folders.items()}
    prompts = {length: prompt(length, SHAPES[shape].vocabulary) for length in PROMPTS}
    runs: list[Run] = []
    peaks: dict[str, int] = {}
    expected: dict[int, list[int]] = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(folder, shape, args.threads)) for name, folder in folders.items()}
        for worker in workers.values():
            for tokens in prompts.values():
                worker.decode(tokens, WARM_UP_STEPS)
        # The first artifact goes first here, so that every run has tokens to compare with.
        for length, tokens in prompts.items():
            expected[length] = next(iter(workers.values())).decode(tokens, STEPS)["tokens"]
        rates = [bandwidth()]
        for number in range(args.rounds):
            for length, tokens in prompts.items():
                for name in rotated(list(workers), number):
                    answer = workers[name].decode(tokens, STEPS)
                    peaks[name] = answer["peak_rss_bytes"]
                    differs = first_difference(answer["tokens"], expected[length])
                    runs.append(Run(name, number + 1, length, answer["first_s"], STEPS / answer["rest_s"], differs))
                    tell(shape, runs[-1])
            rates.append(bandwidth())
    artifacts = (Artifact(name, nodes[name], size(folder), peaks[name]) for name, folder in folders.items())
    return Measured(tuple(artifacts), tuple(runs), tuple(rates))


def prompt(length: int, vocabulary: int) -> list[int]:
    """Return a prompt of random tokens, the same each time."""
    chosen = random.Random(length)
    return [chosen.randrange(vocabulary) for _ in range(length)]


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Return the names in their order, beginning with another one in each round."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


def tell(shape: str, run: Run) -> None:
    """The run is on standard error."""
    print(
        f"{shape} round {run.round}, prompt of {run.prompt}, {run.artifact}: first token after {1e3 * run.ttft_s:,.0f} ms, "
        f"then {run.decode_tokens_per_s:.1f} tokens/s",
        file=sys.stderr,
        flush=True,
    )


def report(args: argparse.Namespace, makers: Sequence[Tool], measured: Mapping[str, Measured]) -> None:
    """Print the tables; results.json and results.md hold them, and no path or name of this machine."""
    results: dict[str, Any] = {
        "schema": 1,
        "command": shown_command(args),
        "machine": machine(),
        "loop": {"threads": args.threads, "steps": STEPS, "prompts": PROMPTS},
        "tools": {maker.name: {"command": maker.shown, "versions": versions(maker.python)} for maker in makers},
        "shapes": {name: {"shape": asdict(SHAPES[name]), **found.as_json()} for name, found in measured.items()},
    }
    tables = [
        f"## {name}: {SHAPES[name].description}, {args.rounds} × interleaved\n\n{figures(found)}\n\n{ratios(found, (GENAI, OPTIMUM))}\n"
        for name, found in measured.items()
    ]
    publish(results, markdown(results, tables, TITLE, NOTES.format(threads=args.threads, steps=STEPS)), args.results)
    print("\n".join(tables))


def shown_command(args: argparse.Namespace) -> str:
    """Return the command that measures the same again; folders do not change what is measured and are left out."""
    return f"python -m benchmarks.decoding.run --shapes {' '.join(args.shapes)} --rounds {args.rounds} --threads {args.threads}"


if __name__ == "__main__":
    sys.exit(main())
