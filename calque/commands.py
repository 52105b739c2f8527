"""What each command does: one function a command, given the parsed arguments, returning the exit code."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, cast

from calque.artifact import Artifact
from calque.console import LiveText, Progress, parity_table, print_json, table
from calque.convert_command import convert
from calque.errors import ArtifactUnreadable, CalqueError, ParityFailed, TargetUnavailable, UsageError

if TYPE_CHECKING:
    from calque.choices import ReportFormat


class _Examinable(Protocol):
    """A target that says what it needs and what of it is here: (what, status, note)."""

    def doctor(self) -> Sequence[tuple[str, str, str]]: ...


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

    live = LiveText(sys.stdout) if sys.stdout.isatty() and not args.json else None
    result = generate(args.folder, args.prompt, args.max_new_tokens, chat=args.chat, threads=args.threads, tell=live)
    if live is not None:
        live.end(result["text"])
    for note in filter(None, (_too_long(result), _stopped(result, args.max_new_tokens))):
        print(note, file=sys.stderr)
    if args.json:
        print_json(result)
        return 0
    if live is None:
        print(result["text"])
    facts = [f"{result['prompt_tokens']} prompt tokens", f"{len(result['tokens'])} new"]
    if result["ttft_ms"] is not None:
        facts.append(f"first after {result['ttft_ms']:.0f} ms")
    if result["tokens_per_s"] is not None:
        facts.append(f"then {result['tokens_per_s']:.1f} tokens/s")
    print(f"[{', '.join(facts)}]", file=sys.stderr)
    return 0


def _too_long(result: Mapping[str, Any]) -> str:
    """Return what to say where the model was driven past the length it was trained for; nothing where it was not."""
    prompt, new, trained = result["prompt_tokens"], len(result["tokens"]), result["trained_length"]
    if trained is None or prompt + new - 1 <= trained:  # the last token was never fed
        return ""
    long = f"the prompt is {prompt} tokens" if prompt > trained else f"prompt and answer are {prompt + new} tokens"
    return f"note: {long}, longer than the {trained} the model was trained for"


def _stopped(result: Mapping[str, Any], asked: int) -> str:
    """Return what to say where the artifact's own limit ended the answer; nothing where it did not."""
    limit, new = result["max_length"], len(result["tokens"])
    if limit is None or new >= asked or result["prompt_tokens"] + new <= limit:
        return ""
    return f"note: stopped after {new} tokens, at the artifact's max_length of {limit}"


def _bench(args: argparse.Namespace) -> int:
    from calque.bench import Bench, bench
    from calque.bench_figures import bench_text

    asked = Bench(tuple(args.prompt_tokens), args.new_tokens, args.rounds, args.threads, args.batch_size)
    with Progress(sys.stderr) as progress:
        found = bench(args.folders, asked, progress)
    print_json(found) if args.json else print(bench_text(found))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from calque import side_by_side

    with Progress(sys.stderr) as progress:
        found = side_by_side.compare(args.folders, args.threads, args.record, progress)
    print_json(found) if args.json else print(side_by_side.text(found))
    lines = side_by_side.faults(found)
    for line in lines:
        print(line, file=sys.stderr)
    return ParityFailed.exit_code if lines else 0


def _inspect(args: argparse.Namespace) -> int:
    from calque.inspection import artifact_facts, artifact_text

    artifact = Artifact.read(args.folder)
    facts = artifact_facts(artifact)
    print_json(facts) if args.json else print(artifact_text(artifact, facts))
    damaged = [f"{name}  {file['status']}" for name, file in facts["files"].items() if file["status"] != "ok"]
    if not damaged:
        return 0
    # Not raised: standard output holds the facts already, and with --json it is one object.
    print(artifact.damage(damaged), file=sys.stderr)
    return ArtifactUnreadable.exit_code


def _report(args: argparse.Namespace) -> int:
    from calque.atomic_file import write_atomically
    from calque.validation.render import report

    form: ReportFormat = args.format or ("json" if args.json and not args.output else "markdown")
    if args.json and not args.output and form != "json":
        raise UsageError(f"--json and --format {form} both claim standard output", fix="leave --json out, or add -o FILE")
    text = report(args.folders, form)
    if not args.output:
        print(text, end="", flush=True)
        return 0
    write_atomically(args.output, text)
    if args.json:
        print_json({"format": form, "output": str(args.output)})
    return 0


def _targets(args: argparse.Namespace) -> int:
    from calque import targets

    found = {}
    for name in targets.names():
        try:
            needed = cast("_Examinable", targets.load(name)()).doctor()
        except CalqueError as error:  # of a plug-in, which must not hide the other targets
            needed = [("plug-in", "unusable", "; ".join((error.what, *error.where)))]
        found[name] = [dict(zip(("what", "status", "note"), row, strict=True)) for row in needed]
    if args.json:
        print_json(found)
    else:
        rows = [(name, row["what"], row["status"], row["note"]) for name, needs in found.items() for row in needs]
        print(table(("target", "needs", "status", "note"), rows))
    return 0


def _conformance(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from calque import conformance, tasks

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it comments on the default configs of its own types
    asked = conformance.Sweep(tasks.find(args.task), args.types, args.shard, args.again, args.timeout, args.target, args.max_length)
    total, begun = len(asked.names()), time.monotonic()

    def tell(name: str, record: conformance.Record) -> None:
        worst = "" if record.get("worst_sigma") is None else f"  {record['worst_sigma']:.1e} σ"
        first = (record.get("error") or "").partition("\n")[0]
        print(f"[{time.monotonic() - begun:6.0f}s] {name}: {record['status']}{worst}  {first}".rstrip(), file=sys.stderr, flush=True)

    records = conformance.sweep(asked, args.results, tell)
    counts = {status: sum(record["status"] == status for record in records.values()) for status in conformance.STATUSES}
    if args.json:
        print_json({"task": asked.task.name, "types": total, **counts, "results": str(args.results), "records": records})
    else:
        print(f"{asked.task.name}: {total} types, " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return conformance.exit_code(records)


def _doctor(args: argparse.Namespace) -> int:
    from calque.doctor import INSTALL_CONVERT, can_load, examine, missing_for_convert

    findings, missing = examine(), missing_for_convert()
    if args.json:
        print_json({"findings": [asdict(finding) for finding in findings], "missing_for_convert": missing})
    else:
        print(table(("what", "found", "status", "note"), [(f.what, f.found, f.status, f.note) for f in findings]))
        print(f"\nconvert: {'missing ' + ', '.join(missing) + '; ' + INSTALL_CONVERT if missing else 'nothing is missing'}")
    return 0 if can_load(findings) else TargetUnavailable.exit_code


HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "convert": convert,
    "validate": _validate,
    "generate": _generate,
    "bench": _bench,
    "compare": _compare,
    "inspect": _inspect,
    "report": _report,
    "targets": _targets,
    "conformance": _conformance,
    "doctor": _doctor,
}
