"""Feeds one ragged batch, padded on the left and on the right, to artifacts of Calque and of its peers, and prints who is right.

``python -m benchmarks.padding.run [--work DIR]``, from the repository root. The first run makes the peers' environments; they are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.conversion.environments import versions
from benchmarks.conversion.records import last_line
from benchmarks.conversion.tools import CALQUE, Tool, environment
from benchmarks.padding.case import LENGTHS, SHAPE, SIDES, STEPS, eager, errors, write
from benchmarks.padding.contenders import Contender, contenders
from benchmarks.padding.tables import Outcome, markdown
from calque.errors import Unsupported
from calque.validation.tolerance import TOLERANCES

ROOT = Path(__file__).parents[2]
COMMAND = "python -m benchmarks.padding.run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, compare, print and write the results; 1 where Calque is wrong."""
    args = parse(arguments)
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    model = work / "padding-model"
    write(model)
    expected = eager(model)
    limit = TOLERANCES["float32"].limit(SHAPE.layers)
    chosen = contenders(work)
    outcomes: list[Outcome] = []
    for one in chosen:
        print(one.tool.name, file=sys.stderr, flush=True)
        outcomes += outcomes_of(one, model, work, expected)
    publish(chosen, outcomes, limit, args.results)
    return int(any(one.failed or one.is_wrong(limit) for one in outcomes if one.tool.startswith(CALQUE)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "conversion", metavar="DIR", help="for environments, which all benchmarks share"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, metavar="DIR", help="where results.json and .md go")
    return parser.parse_args(arguments)


def outcomes_of(one: Contender, model: Path, work: Path, expected: list[Any]) -> list[Outcome]:
    """Return what the tool's artifact, made anew, answers to each side."""
    folder = work / f"padding-{one.tool.slug}"
    if failed := convert(one.tool, model, folder, work):
        return [Outcome(one.tool.name, side, failed=failed) for side in SIDES]
    found = []
    for side in SIDES:
        try:
            found.append(Outcome(one.tool.name, side, tuple(errors(one.answer(folder, side), expected))))
        except Unsupported as refusal:
            found.append(Outcome(one.tool.name, side, refused=" ".join(str(refusal).split())))
    return found


def convert(tool: Tool, model: Path, folder: Path, work: Path) -> str | None:
    """Convert into the folder; return what the tool said last if it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    variables = environment(work) | ({"PYTHONPATH": str(ROOT)} if tool.name.startswith(CALQUE) else {})
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as output:
        command = tool.command(model, folder, work / "genai-cache")
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, cwd=work)
    return f"exit code {done.returncode}: {last_line(log, {work: 'WORK', ROOT: 'ROOT'})}" if done.returncode else None


def publish(chosen: Sequence[Contender], outcomes: Sequence[Outcome], limit: float, folder: Path) -> None:
    """Print the tables; the folder holds them in results.md, and all figures in results.json."""
    results: dict[str, Any] = {
        "schema": 1,
        "command": COMMAND,
        "shape": asdict(SHAPE),
        "lengths": LENGTHS,
        "steps": STEPS,
        "limit": limit,
        "tools": {one.tool.name: {"command": one.tool.shown, "versions": versions(one.tool.python)} for one in chosen},
        "outcomes": [asdict(one) for one in outcomes],
    }
    text = markdown(results, outcomes, {one.tool.name: one.cause for one in chosen})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
