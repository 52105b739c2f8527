"""Several conversions in one run: one after the other, none stopped by another's failure, matrix.json true after each.

::

    PARENT/
      matrix.json                       what came of each conversion that has ended
      {model}-{target}-{precision}/     its artifact; .rejected where it failed its proof
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calque.artifact import REPORT
from calque.atomic_file import write_atomically
from calque.errors import CalqueError, ParityFailed, UsageError
from calque.failures import explained
from calque.staging import check_output, is_artifact, rejected_folder

if TYPE_CHECKING:
    from calque.recipe import Recipe

MATRIX = "matrix.json"
SCHEMA = 1

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What came of one cell. ``folder``: beside matrix.json, None where there is none; ``worst_sigma``: None where unknown.

    ``error``: type, what, where and fix. ``seconds``: of this run, so few for a cell that was skipped.
    """

    name: str
    folder: str | None
    status: Status
    exit_code: int
    error: Mapping[str, Any] | None
    seconds: float
    worst_sigma: float | None


def check_parent(parent: Path, names: Iterable[str], replace: bool) -> None:
    """Leave quietly if every cell may be written; ``replace``: artifacts that are there may go.

    Raises:
        UsageError: all that is in the way; nothing was touched.
    """
    if is_artifact(parent):
        raise UsageError(f"{parent} is an artifact, and several conversions go into a folder around theirs", fix="name another with -o")
    if parent.exists() and not parent.is_dir():
        raise UsageError(f"{parent} is no folder", fix="name another with -o")
    table = parent / MATRIX
    if table.exists() and not _is_ours(table):
        raise UsageError(f"{table} was not written by Calque", fix="move it away, or name another folder with -o")
    found: list[UsageError] = []
    for name in names:
        try:
            check_output(parent / name, replace)
        except UsageError as error:
            found.append(error)
    if found:
        fix = "; ".join(dict.fromkeys(error.fix for error in found))
        raise UsageError("some outputs are in the way", [line for error in found for line in (error.what, *error.where)], fix)


def run(
    cells: Mapping[str, Recipe],
    parent: Path,
    convert: Callable[[Recipe, Path], Status],
    ended: Callable[[Outcome, Exception | None], None],
) -> list[Outcome]:
    """Return what came of each cell, in order; ``ended`` is told as each ends, and matrix.json says so before the next begins.

    ``convert`` leaves an artifact in the folder it is given and returns passed, or skipped where one was there; it may raise
    anything. An interrupt ends the run: what is done stays, and matrix.json holds it.

    Raises:
        UsageError: ``parent`` cannot be written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{parent} cannot be made: {error.strerror}", fix="name another folder with -o") from error
    outcomes: list[Outcome] = []
    _write(parent, outcomes)  # what an earlier run found is no longer so, and a folder that cannot be written is known now
    for name, recipe in cells.items():
        outcome, failure = _run_one(name, recipe, parent, convert)
        outcomes.append(outcome)
        _write(parent, outcomes)
        ended(outcome, failure)
    return outcomes


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Return 0 if no cell failed, else the exit code of the first that did."""
    return next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)


def data(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what matrix.json holds."""
    return {"schema": SCHEMA, "cells": [asdict(outcome) for outcome in outcomes]}


def error_data(error: Exception) -> dict[str, Any]:
    """Return type, what, where and fix of a failure; of one that nobody expected, its own words."""
    known = explained(error, "convert")
    if known is None:
        text = " ".join(str(error).split())
        return {"type": type(error).__name__, "what": text, "where": [], "fix": "report it with the traceback that -v prints"}
    return {"type": type(known).__name__, "what": known.what, "where": list(known.where), "fix": known.fix}


def code_of(error: Exception) -> int:
    """Return the exit code of a failure."""
    return (explained(error, "convert") or CalqueError("")).exit_code


def _run_one(name: str, recipe: Recipe, parent: Path, convert: Callable[[Recipe, Path], Status]) -> tuple[Outcome, Exception | None]:
    out, begun = parent / name, time.monotonic()
    try:
        status = convert(recipe, out)
    except Exception as error:  # whatever befalls one cell, the others have their turn
        # What was there before a conversion failed is not this cell's: only a proof that failed leaves something of its own.
        rejected = rejected_folder(out) if isinstance(error, ParityFailed) else None
        seconds, worst = time.monotonic() - begun, _worst_sigma(rejected) if rejected else None
        return Outcome(name, rejected.name if rejected else None, "failed", code_of(error), error_data(error), seconds, worst), error
    return Outcome(name, name, status, 0, None, time.monotonic() - begun, _worst_sigma(out)), None


def _worst_sigma(folder: Path) -> float | None:
    """Return the worst figure of the report in ``folder``; None where there is none."""
    try:
        rows = json.loads((folder / REPORT).read_text(encoding="utf-8"))["scenarios"]
        return max((row["worst_sigma"] for row in rows if row.get("worst_sigma") is not None), default=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_ours(table: Path) -> bool:
    try:
        found = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "schema" in found and isinstance(found.get("cells"), list)


def _write(parent: Path, outcomes: Sequence[Outcome]) -> None:
    write_atomically(parent / MATRIX, json.dumps(data(outcomes), indent=1, ensure_ascii=False) + "\n")
