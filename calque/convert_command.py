"""The command `convert`: one recipe into one folder, or a matrix of them, and several files, into a folder around theirs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.artifact import REPORT, Artifact
from calque.console import Progress, plan_text, print_json, report_text, size, table
from calque.errors import ParityFailed, RecipeError, Unsupported, UsageError
from calque.failures import explained
from calque.staging import rejected_folder

if TYPE_CHECKING:
    from calque.matrix import Outcome, Status
    from calque.recipe import Recipe

SKIPPED = "skipped (already proved)"


def convert(args: argparse.Namespace) -> int:
    """Follow the recipes that the command line describes; return the exit code."""
    from calque.recipe import default_folder

    if args.resume and args.force:
        raise UsageError("--resume keeps what is proved already, --force replaces it", fix="give one of them")
    recipes = recipes_of(args)
    if len(recipes) == 1 and recipes[0].matrix is None:
        return _plan(recipes[0], args) if args.plan else _convert_one(recipes[0], args.output or Path(default_folder(recipes[0])), args)
    cells = _cells(recipes)
    return _plan_all(cells, args) if args.plan else _convert_all(cells, args.output or Path(), args)


def recipes_of(args: argparse.Namespace) -> list[Recipe]:
    """Return the recipes that the recipe files and the flags describe together; flags win, and every name in them is known.

    Raises:
        RecipeError: everything that does not follow the schema, of all files.
        UsageError: no model or no target is named.
    """
    flags = _flags(args)
    if not args.recipe:
        if "model" not in flags:
            raise UsageError("no model was named", fix="calque convert --target TARGET MODEL, or --recipe FILE")
        if "target" not in flags:
            raise UsageError("no target was named", fix=f"--target NAME, one of: {', '.join(_target_names())}")
        return [_read(None, flags)]
    recipes, faulty = [], []
    for path in args.recipe:
        try:
            recipes.append(_read(path, flags))
        except RecipeError as error:
            faulty.append(error)
    if len(faulty) == 1:
        raise faulty[0]
    if faulty:
        lines = [f"{error.what}: {line}" for error in faulty for line in error.where or (error.fix,)]
        raise RecipeError(f"{len(faulty)} recipes cannot be followed", lines, faulty[0].fix)
    return recipes


def _read(path: Path | None, flags: Mapping[str, Any]) -> Recipe:
    from calque import recipe_names
    from calque.recipe import Recipe

    return Recipe.of(flags, names=recipe_names.problems) if path is None else Recipe.read(path, flags, recipe_names.problems)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    if args.model and args.model_flag:
        raise UsageError("two models were given", [f"MODEL  {args.model}", f"--model  {args.model_flag}"], "give one")
    given = {
        "model": args.model or args.model_flag,
        "task": args.task,
        "target": args.target,
        "precision": args.precision,
        "logits": args.logits,
        "layout": args.layout,
        "dims": {"max_length": args.max_length} if args.max_length else None,
        "random_weights": args.random_weights,
        "trust_remote_code": args.trust_remote_code,
        "require": args.require,
        "threads": args.threads,
        "max_memory": args.max_memory,
        "calibration": {"text": args.calibration} if args.calibration else None,
        "options": _options(args.set) if args.set else None,
        "parity": _parity(args) or None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _parity(args: argparse.Namespace) -> dict[str, Any]:
    given = {
        "scenarios": _scenarios(args.scenarios) if args.scenarios is not None else None,
        "text": args.text,
        "max_kl": args.max_kl,
        "max_size": args.max_size,
        "sensitivity": args.sensitivity,
    }
    return {key: value for key, value in given.items() if value is not None}


def _options(assignments: Sequence[tuple[str, str]]) -> dict[str, Any]:
    from calque.strict_yaml import parse_value

    keys = [key for key, _ in assignments]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UsageError("an option was set more than once", [f"--set {key}=…" for key in twice], "set each once")
    return {key: parse_value(value) for key, value in assignments}


def _scenarios(text: str) -> str | list[str]:
    return text if text == "all" else [name for name in text.split(",") if name]


def _target_names() -> list[str]:
    from calque import targets

    return targets.names()


def _cells(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Return every cell of every recipe by the name of its folder."""
    named = [pair for recipe in recipes for pair in recipe.expand().items()]
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        fix = "convert these recipes one by one, each into a folder of its own"
        raise RecipeError("several recipes would be written to one folder", twice, fix)
    return dict(named)


def _plan(recipe: Recipe, args: argparse.Namespace) -> int:
    plan, code = _planned(recipe)
    print_json(plan) if args.json else print(plan_text(plan))
    return code


def _planned(recipe: Recipe) -> tuple[dict[str, Any], int]:
    from calque import pipeline

    with Progress(sys.stderr) as progress:
        plan = pipeline.plan(recipe, progress=progress)
    return plan, Unsupported.exit_code if plan.get("problems") else 0


def _plan_all(cells: Mapping[str, Recipe], args: argparse.Namespace) -> int:
    from calque.matrix import code_of, error_data

    rows: list[dict[str, Any]] = []
    for number, (name, recipe) in enumerate(cells.items(), 1):
        _announce(number, len(cells), name)
        try:
            plan, code = _planned(recipe)
            rows.append({"name": name, "plan": plan, "exit_code": code, "error": None})
        except Exception as error:
            _print_failure(error, args.verbose)
            rows.append({"name": name, "plan": None, "exit_code": code_of(error), "error": error_data(error)})
        if not args.json and (plan_of_cell := rows[-1]["plan"]):
            print(f"{name}\n{plan_text(plan_of_cell)}\n", flush=True)
    code = next((row["exit_code"] for row in rows if row["exit_code"]), 0)
    if args.json:
        print_json({"exit_code": code, "cells": rows})
    else:
        print(table(("cell", "exit code"), [(row["name"], row["exit_code"]) for row in rows]))
    return code


def _convert_one(recipe: Recipe, out: Path, args: argparse.Namespace) -> int:
    try:
        status = _converter(args)(recipe, out)
    except ParityFailed:
        if not args.json:
            print(report_text(_read_report(rejected_folder(Path(os.path.realpath(out))))))
        raise
    _print_converted(Artifact.read(out), status, args.json)
    return 0


def _convert_all(cells: Mapping[str, Recipe], parent: Path, args: argparse.Namespace) -> int:
    from calque import matrix, side_by_side

    done: list[Outcome] = []
    names = list(cells)

    def ended(outcome: Outcome, failure: Exception | None) -> None:
        done.append(outcome)
        if failure:
            _print_failure(failure, args.verbose)
        if len(done) < len(names):
            _announce(len(done) + 1, len(names), names[len(done)])

    matrix.check_parent(parent, names, args.force or args.resume)
    _announce(1, len(names), names[0])
    try:
        matrix.run(cells, parent, _converter(args), ended)
    except KeyboardInterrupt:
        if done and not args.json:
            print(_outcome_table(done), flush=True)
        print(f"{len(done)} of {len(names)} conversions had ended; --resume goes on from there", file=sys.stderr)
        raise
    code = matrix.exit_code(done)
    beside, differing = _side_by_side(done, parent, args.threads or 0)
    if args.json:
        print_json({"folder": str(parent), "exit_code": code or differing, **matrix.data(done), "across": beside})
    else:
        print("\n\n".join([_outcome_table(done), *map(side_by_side.text, beside)]))
    return code or differing


def _side_by_side(done: Sequence[Outcome], parent: Path, threads: int) -> tuple[list[dict[str, Any]], int]:
    """Return what was found of artifacts of one model for several targets, which their reports hold now, and the exit code of that."""
    from calque import side_by_side

    artifacts = [Artifact.read(parent / outcome.folder) for outcome in done if outcome.status != "failed" and outcome.folder]
    found = [side_by_side.compare(folders, threads, record=True) for folders in side_by_side.groups(artifacts)]
    lines = [line for beside in found for line in side_by_side.faults(beside)]
    for line in lines:
        print(line, file=sys.stderr)
    return found, ParityFailed.exit_code if lines else 0


def _converter(args: argparse.Namespace) -> Callable[[Recipe, Path], Status]:
    """Return what converts one recipe into one folder as the flags say, and raises what went wrong with the rejected folder named."""
    from calque import pipeline

    def convert_into(recipe: Recipe, out: Path) -> Status:
        with Progress(sys.stderr) as progress:
            if args.resume and os.path.lexists(out):
                from calque.resume import differences

                progress("compare with what is there")
                if not (found := differences(recipe, out)):
                    return "skipped"
                progress(f"convert, because {found[0]}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}")
            try:
                pipeline.convert(recipe, out, force=args.force or args.resume, progress=progress)
            except ParityFailed as error:
                rejected = rejected_folder(Path(os.path.realpath(out)))
                raise ParityFailed(error.what, (*error.where, f"rejected folder: {rejected}"), error.fix) from error
        return "passed"

    return convert_into


def _announce(number: int, total: int, name: str) -> None:
    print(f"{number} of {total}: {name}", file=sys.stderr, flush=True)


def _print_failure(error: Exception, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    known = explained(error, "convert")
    text = str(known) if known else f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
    print(text, file=sys.stderr, flush=True)


def _outcome_table(outcomes: Sequence[Outcome]) -> str:
    header = ("cell", "status", "exit code", "worst |Δ|/σ", "seconds")
    return table(header, [_outcome_row(outcome) for outcome in outcomes])


def _outcome_row(outcome: Outcome) -> tuple[object, ...]:
    status = SKIPPED if outcome.status == "skipped" else outcome.status
    worst = "–" if outcome.worst_sigma is None else f"{outcome.worst_sigma:.1e}"
    return outcome.name, status, outcome.exit_code, worst, f"{outcome.seconds:.1f}"


def _read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report


def _print_converted(artifact: Artifact, status: Status, as_json: bool) -> None:
    from calque.inspection import proof_lines

    report = _read_report(artifact.folder)
    if as_json:
        facts = {"artifact": str(artifact.folder), "status": status, "target": artifact.target, "precision": artifact.precision}
        print_json({**facts, "proof": artifact.manifest()["proof"], "report": report})
        return
    if status == "skipped":
        print(f"{artifact.folder}: {SKIPPED}")
        return
    if text := report_text(report):
        print(text, end="\n\n")
    print("\n".join(proof_lines(artifact)))
    if notes := report.get("notes"):
        print("\n" + "\n".join(f"note: {note}" for note in notes))
    total = sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file())
    print(f"\nwrote {artifact.folder} ({size(total)})")
