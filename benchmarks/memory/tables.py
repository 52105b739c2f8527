"""The Markdown that shows predictions beside measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.memory.run import Run

TITLE = "What `--plan` predicts, and what a conversion takes"
NOTES = """\
Each cell: predicted / measured MB, and by how much the prediction is high. *convert* and *proof* are the highest resident memory of
those stages, *peak* that of the whole tree of processes sampled every 20 ms, pages of mapped files included; *disk* is the most that
was taken of the disk at any moment, what the conversion deletes again included. *by*: whether the proof ran the whole artifact or
blocks of it, as the ceiling asks for. Weights are random bfloat16. Processor and wall seconds are not of a quiet
machine: nothing here depends on them."""
COLUMNS = ("convert", "prove", "peak", "artifact", "disk")


def table(runs: Sequence[Run]) -> str:
    """Return a row a run."""
    lines = ["| conversion | by | convert | proof | peak | artifact | disk | CPU s | wall s |", "|" + " --- |" * 9]
    for run in runs:
        if run.message:
            lines.append(f"| `{run.command}` | failed: {run.message} |" + " |" * 7)
            continue
        cells = [_cell(run.predicted[name], run.measured[name]) for name in COLUMNS]
        by = "blocks" if run.by_blocks else "whole"
        lines.append(f"| `{run.command}` | {by} | {' | '.join(cells)} | {run.cpu_s:,.0f} | {run.wall_s:,.0f} |")
    return "\n".join(lines) + "\n"


def _cell(predicted: int, measured: int) -> str:
    return f"{predicted / 1e6:,.0f} / {measured / 1e6:,.0f}, {100 * (predicted / measured - 1):+.0f} %"
