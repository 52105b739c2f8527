"""docs/support.md shows docs/support.json, the records of `calque conformance`. A test holds the two equal.

Run this file after a sweep; with the files of several shards as arguments, these are put together into docs/support.json first.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from calque.conformance import STATUSES, Record, merged, read, write
from calque.tasks import TASKS

PAGE = Path(__file__).with_name("support.md")
RESULTS = Path(__file__).with_name("support.json")

OPENING = """# What converts

<!-- Written by docs/support.py from docs/support.json; do not edit. -->

Every model type that transformers has for a task, made small ([calque/shrink.py](../calque/shrink.py), with
[what single types need](../calque/shrink.yaml)), given random weights, converted to ONNX Runtime in fp32, and put through the
whole parity gate. A name with a suffix is another form of a type. *Worst* is the largest difference from eager, in standard
deviations of the logits; the limit grows with the layers ([tolerance.md](tolerance.md)).

| status | meaning |
|---|---|
| passed | every scenario agrees with the eager model, within the limits that the last column names |
| failed | the artifact was made and rejected |
| unsupported | refused by name before anything was written |
| error | upstream cannot build the type here, or its conversion crashed or hung; the text says which |

```bash
calque conformance --results docs/support.json && python docs/support.py
calque conformance --shard 1/4 --results shard-1.json   # in parallel; then: python docs/support.py shard-*.json
```

A type is run again only when its small config, the versions or Calque's own code have changed; `--again failed,error` asks for more.
"""

# The records hold more of an error's text.
SHOWN_LINES, SHOWN_WIDTH = 3, 180

LIMITS = {
    "padding": lambda value: f"padding: {value}",
    "batched_chunk": lambda value: "no batched chunks",
    "max_length": lambda value: "length bounded",
    "recompute_at": lambda value: "cache recomputed past a length",
}


def page(tasks: dict[str, dict[str, Record]]) -> str:
    """Return the whole page."""
    ordered = {task: tasks[task] for task in TASKS if task in tasks}
    return "\n".join([OPENING, _counts(ordered), *(_section(task, records) for task, records in ordered.items())])


def _counts(tasks: dict[str, dict[str, Record]]) -> str:
    heads = ["task", "types", *STATUSES, "minutes, one type at a time"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task, records in tasks.items():
        counts = Counter(record["status"] for record in records.values())
        minutes = sum(record.get("seconds", 0.0) for record in records.values()) / 60
        cells = [f"[{task}](#{task})", len(records), *(counts[status] for status in STATUSES), f"{minutes:.0f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    versions = {f"{name} {version}" for records in tasks.values() for row in records.values() for name, version in row["tools"].items()}
    return "\n".join([*rows, "", f"With {', '.join(sorted(versions))}, on two cores that other work shared.", ""])


def _section(task: str, records: dict[str, Record]) -> str:
    rows = [f"| {' | '.join(_cells(name, record))} |" for name, record in records.items()]
    head = "| type | status | worst | model | limits, or what says no |"
    return "\n".join([f"## {task}", "", head, "|---|---|---|---|---|", *rows, ""])


def _cells(name: str, record: Record) -> list[str]:
    worst = record.get("worst_sigma")
    limits = ", ".join(LIMITS[key](value) for key, value in record.get("limits", {}).items())
    said = record.get("error", limits or "none")
    return [
        f"`{name}`",
        record["status"],
        "" if worst is None else f"{worst:.1e} σ",
        ", ".join(record.get("features", [])),
        "<br>".join(_escaped(line) for line in said.splitlines()[:SHOWN_LINES]),
    ]


def _escaped(line: str) -> str:
    line = line if len(line) <= SHOWN_WIDTH else f"{line[:SHOWN_WIDTH]}…"
    for sign in "\\`*_[]<>|":
        line = line.replace(sign, f"\\{sign}")
    return line.strip()


if __name__ == "__main__":
    if shards := [Path(argument) for argument in sys.argv[1:]]:
        write(RESULTS, merged(shards))
    PAGE.write_text(page(read(RESULTS)), encoding="utf-8")
