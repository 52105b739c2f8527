"""Every type that transformers has for a task, shrunken, through the whole pipeline: what works, and what says no and why.

Each type runs in a process of its own: a crash, a hang, or the kernel's kill is that type's result and not the sweep's end.
A record whose config, versions and code are those of now is not made again, so a sweep that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calque import isolation, shrink
from calque.artifact import MANIFEST, REPORT
from calque.atomic_file import write_atomically
from calque.cli import main
from calque.companions import PREPROCESSOR
from calque.errors import CalqueError, ParityFailed, SourceUnreadable, UsageError
from calque.features import features
from calque.staging import rejected_folder
from calque.suggest import nearest

if TYPE_CHECKING:
    from calque.tasks import Task

SCHEMA = 1
TIMEOUT_MINUTES = 10
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
STATUSES = ("passed", "failed", "unsupported", "error")
OF_EXIT_CODE = {0: "passed", 3: "failed", 4: "unsupported"}

# What makes the small config and what runs the sweep: the config itself is in the fingerprint.
NOT_CONVERTING = {"conformance.py", "shrink.py", "features.py", "isolation.py"}
ERROR_LINES = 6
ERROR_WIDTH = 400

Record = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What to run: a task's types, thinned to one shard, and which records are made again although nothing changed.

    ``target``: what they are converted for, in its own precision. ``max_length``: how long a row may get, None leaves it to the model:
    a cache of slots is filled to the last of them.
    """

    task: Task
    types: tuple[str, ...] = ()
    shard: tuple[int, int] = (1, 1)
    again: frozenset[str] = frozenset()
    minutes: float = TIMEOUT_MINUTES
    target: str = "onnxruntime"
    max_length: int | None = None

    def names(self) -> list[str]:
        """Return the types to run, in order.

        Raises:
            UsageError: names that are no type of the task, or a shard that there is not.
        """
        index, count = self.shard
        if not 1 <= index <= count:
            raise UsageError(f"there is no shard {index} of {count}", fix="--shard 1/4 is the first of four")
        known = names_of(self.task)
        if unknown := [name for name in self.types if name not in known]:
            lines = [f"{name}{nearest(name, known)}" for name in unknown]
            raise UsageError(f"transformers has no such type for {self.task.name}", lines, "leave --types out for all of them")
        return (list(self.types) or known)[index - 1 :: count]


def names_of(task: Task) -> list[str]:
    """Return every type of transformers' mapping for the task, and the variants of them that shrink.yaml adds."""
    from transformers.models.auto import modeling_auto

    types = list(getattr(modeling_auto, task.mapping))
    added = [name for name, row in shrink.variants().items() if row["type"] in types and task.name in row["tasks"]]
    return sorted(types) + sorted(added)


def sweep(asked: Sweep, results: Path, progress: Callable[[str, Record], None]) -> dict[str, Record]:
    """``results`` holds a record for each type that was asked for; return these, whether made now or before.

    The file is written after each type, in one step. ``progress`` is told each record as it is made.
    """
    chosen = {}
    code = code_digest()
    for name in asked.names():
        known = read(results).get(asked.task.name, {}).get(name)
        made = run_case(asked, name, code, known)
        if made is not known:
            table = read(results)
            table.setdefault(asked.task.name, {})[name] = made
            write(results, table)
            progress(name, made)
        chosen[name] = made
    return chosen


def exit_code(records: Mapping[str, Record]) -> int:
    """Return 3 where a type failed the gate, 1 where one crashed or hung, 0 where all passed or were refused with a reason."""
    if any(record["status"] == "failed" for record in records.values()):
        return ParityFailed.exit_code
    # A type that upstream cannot build is its own business: 7, as `calque convert` would say.
    broken = (record["status"] == "error" and record["exit_code"] != SourceUnreadable.exit_code for record in records.values())
    return CalqueError.exit_code if any(broken) else 0


def run_case(asked: Sweep, name: str, code: str, known: Record | None) -> Record:
    """Return the record of one type: ``known`` itself where it still holds, else one made now."""
    begun = time.monotonic()
    with TemporaryDirectory(prefix=f"calque-{name}-") as scratch:
        folder = Path(scratch) / name  # a source is called what its folder is
        try:
            config = shrink.shrunken(name, causal=asked.task.converter == "causal_lm")
            config.save_pretrained(folder)
            if asked.task.of_images:  # not every config says how large they are; those of a fixed size keep their own
                sides = {"height": shrink.IMAGE, "width": shrink.IMAGE}
                (folder / PREPROCESSOR).write_text(json.dumps({"size": sides}), encoding="utf-8")
        except Exception as error:  # config classes are foreign code and raise anything
            text = f"no small config: {type(error).__name__}: {error}"
            # Nothing ran, so nothing but the text can change.
            record = {
                "status": "error",
                "exit_code": SourceUnreadable.exit_code,
                "error": _short(text, folder),
                "fingerprint": _digest(text),
                "tools": tools(),
            }
            return known if known and known["fingerprint"] == record["fingerprint"] else record
        asks = [] if asked.target == "onnxruntime" else [asked.target, asked.max_length]
        fingerprint = _digest(json.dumps([_stable(folder / "config.json"), tools(), code, *asks]))
        if known and known["fingerprint"] == fingerprint and not asked.again & {known["status"], "all"}:
            return known
        result = _convert(asked, folder)
        seconds = round(time.monotonic() - begun, 1)
        return {**result, "seconds": seconds, "features": features(config), "fingerprint": fingerprint, "tools": tools()}


def _convert(asked: Sweep, folder: Path) -> Record:
    """Return what `calque convert` of the config in ``folder`` came to."""
    out = folder / "out"
    ended = isolation.call(main, arguments_of(asked, folder / "config.json", out), asked.minutes * 60)
    code = ended.code
    if code is None:
        return {"status": "error", "exit_code": None, "error": f"did not end within {asked.minutes:g} minutes"}
    if code < 0:
        name = signal.Signals(-code).name
        return {"status": "error", "exit_code": code, "error": _short(f"killed by {name}\n{_last_lines(ended.stderr)}", folder)}
    made = out if code == 0 else rejected_folder(out)
    record: Record = {"status": OF_EXIT_CODE.get(code, "error"), "exit_code": code, **_measured(made)}
    if code:
        record["error"] = _short(_error_text(ended.stdout, ended.stderr), folder)
    return record


def arguments_of(asked: Sweep, config: Path, out: Path) -> list[str]:
    """Return the command line of one conversion, the one that a user would give; small models gain nothing from more threads."""
    longest = [] if asked.max_length is None else ["--max-length", str(asked.max_length)]
    settings = ["--task", asked.task.name, "--target", asked.target, *longest]
    return ["convert", str(config), "--random-weights", "--json", "--threads", "1", *settings, "-o", str(out)]


def _measured(folder: Path) -> Record:
    """Return what the report and the manifest of an artifact, or of a rejected one, say; nothing where there is none."""
    if not (folder / REPORT).is_file():
        return {}
    rows = json.loads((folder / REPORT).read_text(encoding="utf-8"))["scenarios"]
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    figures = [row["worst_sigma"] for row in rows if row["worst_sigma"] is not None]
    plain = {"padding": "any", "batched_chunk": True}
    return {
        "worst_sigma": float(f"{max(figures):.1e}") if figures else None,
        "scenarios": dict(sorted(Counter(row["status"] for row in rows).items())),
        **({} if manifest["proof"]["build"]["by"] in (None, manifest["target"]) else {"build": manifest["proof"]["build"]["status"]}),
        "limits": {name: limit for name, limit in manifest["limits"].items() if limit is not None and limit != plain.get(name)},
    }


def _error_text(stdout: str, stderr: str) -> str:
    try:
        error = json.loads(stdout)["error"]
    except (ValueError, KeyError):
        return _last_lines(stderr)
    return "\n".join([error["what"], *(line for line in error["where"] if not line.startswith("rejected folder"))])


def _last_lines(stderr: str) -> str:
    return "\n".join(line for line in stderr.splitlines()[-ERROR_LINES:] if line.strip())


def _short(text: str, folder: Path) -> str:
    """Return the first lines, none of them too long, without the paths of this machine."""
    for place in sorted({*filter(None, sys.path), str(folder)}, key=len, reverse=True):
        text = text.replace(f"{place}{os.sep}", "")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    short = [line if len(line) <= ERROR_WIDTH else f"{line[:ERROR_WIDTH]}…" for line in lines[:ERROR_LINES]]
    return "\n".join([*short, *(["…"] if len(lines) > ERROR_LINES else [])])


def _stable(path: Path) -> str:
    """Return the config as text without what its own save adds of the moment."""
    table = json.loads(path.read_text(encoding="utf-8"))
    table.pop("transformers_version", None)
    return json.dumps(table, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tools() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {name: version(name) for name in TOOLS}


def code_digest() -> str:
    """Return a digest of every module of Calque that takes part in a conversion."""
    root = Path(__file__).parent
    folders = [root, *(root / name for name in ("converters", "passes", "runtime", "targets", "validation"))]
    files = sorted(path for folder in folders for path in folder.glob("*.py") if path.name not in NOT_CONVERTING)
    return _digest("".join(f"{path.parent.name}/{path.name} {_digest(path.read_text(encoding='utf-8'))}\n" for path in files))


def read(results: Path) -> dict[str, dict[str, Record]]:
    """Return the records by task and type; none where there is no file yet.

    Raises:
        UsageError: the file is not one that a sweep wrote.
    """
    if not results.exists():
        return {}
    try:
        table = json.loads(results.read_text(encoding="utf-8"))
        if table["schema"] != SCHEMA:
            raise UsageError(f"{results} has schema {table['schema']}, this Calque reads {SCHEMA}", fix="upgrade calque")
        tasks: dict[str, dict[str, Record]] = table["tasks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{results} holds no results of a sweep: {error}", fix="name another file with --results") from error
    return tasks


def write(results: Path, tasks: Mapping[str, Mapping[str, Record]]) -> None:
    """``results`` holds the records, sorted, written in one step."""
    ordered = {task: dict(sorted(records.items())) for task, records in sorted(tasks.items())}
    write_atomically(results, json.dumps({"schema": SCHEMA, "tasks": ordered}, indent=1, ensure_ascii=False) + "\n")


def merged(files: Collection[Path]) -> dict[str, dict[str, Record]]:
    """Return the records of several shards together; a later file wins."""
    together: dict[str, dict[str, Record]] = {}
    for file in files:
        for task, records in read(file).items():
            together.setdefault(task, {}).update(records)
    return together
