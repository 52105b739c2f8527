"""docs/support.md shows docs/support.json, the records of `calque conformance`, and docs/targets/TARGET-support.md those of other targets.

Run this file after a sweep; with the files of several shards as arguments, these are put together into docs/support.json first, or after
`--target TARGET` into that target's. A test holds pages and records equal.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from calque.conformance import STATUSES, Record, merged, read, write
from calque.tasks import TASKS

DOCS = Path(__file__).parent
ONNX_RUNTIME, TENSORRT = "onnxruntime", "tensorrt"

STATUS_TABLE = """
| status | meaning |
|---|---|
| passed | every scenario agrees with the eager model, within the limits that the last column names |
| failed | the artifact was made and rejected |
| unsupported | refused by name before anything was written |
| error | upstream cannot build the type here, or its conversion crashed or hung; the text says which |
"""

OPENINGS = {
    ONNX_RUNTIME: """# What converts

<!-- Written by docs/support.py from docs/support.json; do not edit. -->

Every model type that transformers has for a task, made small ([calque/shrink.py](../calque/shrink.py), with
[what single types need](../calque/shrink.yaml)), given random weights, converted to ONNX Runtime in fp32, and put through the
whole parity gate. A name with a suffix is another form of a type. *Worst* is the largest difference from eager, in standard
deviations of the logits; the limit grows with the layers ([tolerance.md](tolerance.md)).
{statuses}
```bash
calque conformance --results docs/support.json && python docs/support.py
calque conformance --shard 1/4 --results shard-1.json   # in parallel; then: python docs/support.py shard-*.json
```

A type is run again only when its small config, the versions or Calque's own code have changed; `--again failed,error` asks for more.
""",
    TENSORRT: """# What converts to TensorRT

<!-- Written by docs/support.py from docs/targets/tensorrt-support.json; do not edit. -->

The types of [support.md](../support.md), small and with random weights, converted for TensorRT in fp16 with 64 slots: held against
the static rules, put through the whole parity gate in ONNX Runtime, and built by TensorRT-RTX on the CPU. *Build* is the builder's
verdict; no engine was run. Mixtures of experts may fail in fp16: at a near tie, which random weights have many of, rounding sends a
token to another expert.
{statuses}
```bash
calque conformance --target tensorrt --max-length 64 --results docs/targets/tensorrt-support.json && python docs/support.py
```
""",
}

# The compiled targets: well-known types, each with what others have not. A whole sweep is the same command without --types.
COMPILED = """# What converts to {title}

<!-- Written by docs/support.py from docs/targets/{target}-support.json; do not edit. -->

Well-known types of [support.md](../support.md), small and with random weights, converted for `{target}` in fp32 and put through the whole
parity gate, the file being run {by}. Types that are not here were not asked for.
{{statuses}}
```bash
calque conformance --target {target}{length} --types {types} --results docs/targets/{target}-support.json
python docs/support.py
```
"""
TYPES = (
    "llama,mistral,qwen2,qwen3,gemma2,gemma3_text,phi3,gpt2,gpt_neox,gpt_oss,mixtral,qwen3_moe,bloom,falcon,opt,mpt,olmo2,granite,"
    "smollm3,stablelm"
)
SHORT = " --max-length 128"
OPENINGS |= {
    target: COMPILED.format(title=title, target=target, by=by, types=types, length=length)
    for target, title, by, types, length in (
        ("torchscript", "TorchScript", "by torch", TYPES, ""),
        ("torchscript-lite", "TorchScript Lite", "by the lite interpreter", TYPES, ""),
        ("aotinductor", "AOTInductor", "where it was compiled", "llama,qwen3,gemma3_text,phi3,gpt2,mixtral,bloom", ""),
        ("coreml", "Core ML", "by the interpreter of MIL", TYPES, SHORT),
    )
}

# The records hold more of an error's text.
SHOWN_LINES, SHOWN_WIDTH = 3, 180

LIMITS = {
    "padding": lambda value: f"padding: {value}",
    "batched_chunk": lambda value: "no batched chunks",
    "max_length": lambda value: "length bounded",
    "recompute_at": lambda value: "cache recomputed past a length",
}


def results_of(target: str) -> Path:
    """Return the file with a target's records."""
    return DOCS / "support.json" if target == ONNX_RUNTIME else DOCS / "targets" / f"{target}-support.json"


def page_of(target: str) -> Path:
    """Return the page that shows a target's records."""
    return results_of(target).with_suffix(".md")


def page(target: str, tasks: dict[str, dict[str, Record]]) -> str:
    """Return the whole page."""
    ordered = {task: tasks[task] for task in TASKS if task in tasks}
    opening = OPENINGS[target].format(statuses=STATUS_TABLE)
    return "\n".join([opening, _counts(ordered), *(_section(task, records) for task, records in ordered.items())])


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
    built = any("build" in record for record in records.values())
    heads = ["type", "status", "worst", *(["build"] if built else []), "model", "limits, or what says no"]
    rows = [f"| {' | '.join(_cells(name, record, built))} |" for name, record in records.items()]
    return "\n".join([f"## {task}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows, ""])


def _cells(name: str, record: Record, built: bool) -> list[str]:
    worst = record.get("worst_sigma")
    limits = ", ".join(LIMITS[key](value) for key, value in record.get("limits", {}).items())
    said = record.get("error", limits or "none")
    return [
        f"`{name}`",
        record["status"],
        "" if worst is None else f"{worst:.1e} σ",
        *([record.get("build", "").replace("_", " ")] if built else []),
        ", ".join(record.get("features", [])),
        "<br>".join(_escaped(line) for line in said.splitlines()[:SHOWN_LINES]),
    ]


def _escaped(line: str) -> str:
    line = line if len(line) <= SHOWN_WIDTH else f"{line[:SHOWN_WIDTH]}…"
    for sign in "\\`*_[]<>|":
        line = line.replace(sign, f"\\{sign}")
    return line.strip()


def main(arguments: Sequence[str]) -> None:
    """Write the pages, of records that are put together first where files of shards are named."""
    target, shards = (arguments[1], arguments[2:]) if arguments[:1] == ["--target"] else (ONNX_RUNTIME, arguments)
    if shards:
        write(results_of(target), merged([Path(shard) for shard in shards]))
    for name in OPENINGS:
        page_of(name).write_text(page(name, read(results_of(name))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
