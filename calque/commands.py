"""What each command does: one function a command, given the parsed arguments, returning the exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from calque.artifact import REPORT, Artifact
from calque.console import Progress, parity_table, plan_text, report_text, size, table
from calque.errors import ArtifactUnreadable, ParityFailed, TargetUnavailable, Unsupported, UsageError
from calque.staging import rejected_folder
from calque.suggest import nearest

if TYPE_CHECKING:
    from calque.recipe import Recipe


class _Examinable(Protocol):
    """A target that says what it needs and what of it is here: (what, status, note)."""

    def doctor(self) -> Sequence[tuple[str, str, str]]: ...


def print_json(value: object) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False), flush=True)


def _convert(args: argparse.Namespace) -> int:
    from calque.recipe import default_folder

    recipe = recipe_of(args)
    _check_target(recipe.target)
    from calque import pipeline

    _silence_progress_bars()
    if args.plan:
        with Progress(sys.stderr) as progress:
            plan = pipeline.plan(recipe, progress=progress)
        print_json(plan) if args.json else print(plan_text(plan))
        return Unsupported.exit_code if plan.get("problems") else 0
    out = args.output or Path(default_folder(recipe))
    try:
        with Progress(sys.stderr) as progress:
            artifact = pipeline.convert(recipe, out, force=args.force, progress=progress)
    except ParityFailed as error:
        rejected = rejected_folder(Path(os.path.realpath(out)))
        if not args.json:
            print(report_text(_read_report(rejected)))
        raise ParityFailed(error.what, (*error.where, f"rejected folder: {rejected}"), error.fix) from error
    _print_converted(artifact, args.json)
    return 0


def _silence_progress_bars() -> None:
    """Leave the terminal to our own progress: transformers draws a bar whenever it loads weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe that the recipe file and the flags describe together; flags win.

    Raises:
        RecipeError: everything that does not follow the schema.
        UsageError: no model or no target is named.
    """
    from calque.recipe import Recipe

    if args.model and args.model_flag:
        raise UsageError("two models were given", [f"MODEL  {args.model}", f"--model  {args.model_flag}"], "give one")
    given = {
        "model": args.model or args.model_flag,
        "task": args.task,
        "target": args.target,
        "precision": args.precision,
        "logits": args.logits,
        "random_weights": args.random_weights,
        "trust_remote_code": args.trust_remote_code,
        "require": args.require,
        "threads": args.threads,
        "max_memory": args.max_memory,
        "calibration": {"text": args.calibration} if args.calibration else None,
        "options": _options(args.set) if args.set else None,
        "parity": {"scenarios": _scenarios(args.scenarios)} if args.scenarios is not None else None,
    }
    flags = {key: value for key, value in given.items() if value is not None}
    if args.recipe is not None:
        return Recipe.read(args.recipe, flags)
    if "model" not in flags:
        raise UsageError("no model was named", fix="calque convert --target TARGET MODEL, or --recipe FILE")
    if "target" not in flags:
        raise UsageError("no target was named", fix=f"--target NAME, one of: {', '.join(_target_names())}")
    return Recipe.of(flags)


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


def _check_target(name: str) -> None:
    names = _target_names()
    if name not in names:
        raise UsageError(f"there is no target `{name}`{nearest(name, names)}", fix=f"targets: {', '.join(names)}")


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report


def _print_converted(artifact: Artifact, as_json: bool) -> None:
    from calque.inspection import proof_lines

    report = _read_report(artifact.folder)
    if as_json:
        facts = {"artifact": str(artifact.folder), "target": artifact.target, "precision": artifact.precision}
        print_json({**facts, "proof": artifact.manifest()["proof"], "report": report})
        return
    if text := report_text(report):
        print(text, end="\n\n")
    print("\n".join(proof_lines(artifact)))
    total = sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file())
    print(f"\nwrote {artifact.folder} ({size(total)})")


def _validate(args: argparse.Namespace) -> int:
    from calque.validation.validate import validate

    report = validate(args.folder, args.threads)
    failures = report.get("failures") or []
    if args.json:
        print_json(report)
    else:
        if report["scenarios"]:
            print(parity_table(report["scenarios"]), end="\n\n")
        print(f"{args.folder}: {report['status'].replace('_', ' ')}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 0 if report["status"] == "passed" else ParityFailed.exit_code


def _generate(args: argparse.Namespace) -> int:
    from calque.runtime.generate import generate

    result = generate(args.folder, args.prompt, args.max_new_tokens, chat=args.chat, threads=args.threads)
    if args.json:
        print_json(result)
        return 0
    print(result["text"])
    facts = [f"{result['prompt_tokens']} prompt tokens", f"{len(result['tokens'])} new"]
    if result["ttft_ms"] is not None:
        facts.append(f"first after {result['ttft_ms']:.0f} ms")
    if result["tokens_per_s"] is not None:
        facts.append(f"then {result['tokens_per_s']:.1f} tokens/s")
    print(f"[{', '.join(facts)}]", file=sys.stderr)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from calque.inspection import artifact_facts, artifact_text

    artifact = Artifact.read(args.folder)
    facts = artifact_facts(artifact)
    print_json(facts) if args.json else print(artifact_text(artifact, facts))
    damaged = [f"{name}  {file['status']}" for name, file in facts["files"].items() if file["status"] != "ok"]
    if not damaged:
        return 0
    # Not raised: standard output holds the facts already, and with --json it is one object.
    print(ArtifactUnreadable(f"{args.folder} is damaged", damaged, "copy it again, or convert the model again"), file=sys.stderr)
    return ArtifactUnreadable.exit_code


def _targets(args: argparse.Namespace) -> int:
    from calque import targets

    found = {}
    for name in targets.names():
        target = cast("_Examinable", targets.load(name)())
        found[name] = [dict(zip(("what", "status", "note"), row, strict=True)) for row in target.doctor()]
    if args.json:
        print_json(found)
    else:
        rows = [(name, row["what"], row["status"], row["note"]) for name, needs in found.items() for row in needs]
        print(table(("target", "needs", "status", "note"), rows))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from calque.doctor import INSTALL_CONVERT, can_load, examine

    findings = examine()
    missing = [finding.what for finding in findings if finding.note == INSTALL_CONVERT]
    if args.json:
        print_json({"findings": [asdict(finding) for finding in findings], "missing_for_convert": missing})
    else:
        print(table(("what", "found", "status", "note"), [(f.what, f.found, f.status, f.note) for f in findings]))
        print(f"\nconvert: {'missing ' + ', '.join(missing) + '; ' + INSTALL_CONVERT if missing else 'nothing is missing'}")
    return 0 if can_load(findings) else TargetUnavailable.exit_code


HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "convert": _convert,
    "validate": _validate,
    "generate": _generate,
    "inspect": _inspect,
    "targets": _targets,
    "doctor": _doctor,
}
