"""What a person sees: progress while work runs, and tables of what came out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Row = Sequence[object]


class Progress:
    """Shows the stage that runs: a live line on a terminal, else one plain line for each stage as it begins."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = self._stage_began = time.monotonic()
        self._stage = ""
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import Progress as RichProgress
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._live = RichProgress(*columns, console=Console(file=self._stream), transient=True)
            self._live.start()
        return self

    def __call__(self, stage: str) -> None:
        """Say that ``stage`` begins, and the one before it has ended."""
        now = time.monotonic()
        if self._live is None:
            print(f"[{now - self._began:6.1f}s] {stage} …", file=self._stream, flush=True)
        else:
            self._end_stage(now)
            self._task = self._live.add_task(stage, total=None)
        self._stage, self._stage_began = stage, now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop showing; what failed leaves no line of its own."""
        if self._live is None:
            return
        if error is None:
            self._end_stage(time.monotonic())
        self._live.stop()

    def _end_stage(self, now: float) -> None:
        if self._live is not None and self._task is not None:
            self._live.remove_task(self._task)
            self._task = None
            self._live.console.print(f"{now - self._stage_began:7.1f}s  {self._stage}", markup=False, highlight=False)


class LiveText:
    """Shows a text while it grows; called with the whole so far."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = ""

    def __call__(self, text: str) -> None:
        """Show what is new in ``text``."""
        self._show(text.rstrip("\ufffd"))  # half a character, until the token with its other half comes

    def end(self, text: str) -> None:
        """Show the rest, and end the line."""
        if not text.startswith(self._shown):  # the tokenizer took back what it had made of the first tokens
            print(file=self._stream)
            self._shown = ""
        self._show(text)
        print(file=self._stream, flush=True)

    def _show(self, text: str) -> None:
        if text.startswith(self._shown):
            print(text[len(self._shown) :], end="", file=self._stream, flush=True)
            self._shown = text


def print_json(value: object) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False), flush=True)


def table(header: Row, rows: Iterable[Row]) -> str:
    """Return the rows as aligned columns under their header; numbers stand at the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    at_right = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = (cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, at_right, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def _is_number(cell: str) -> bool:
    return not cell or cell == "–" or cell[0].isdigit()


def size(count: float | None) -> str:
    """Return a number of bytes as people read it: ``11.8 MB``."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count == int(count) else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def parity_table(scenarios: Sequence[Mapping[str, Any]]) -> str:
    """Return the scenarios of a report as a table; σ is the standard deviation of the reference's output."""
    header = ("scenario", "rows", "positions", "worst |Δ|/σ", "mean |Δ|/σ", "limit", "top-1", "near ties", "seconds", "status")
    return table(header, [_parity_row(scenario) for scenario in scenarios])


def _parity_row(scenario: Mapping[str, Any]) -> Row:
    def number(key: str, form: str) -> str:
        value = scenario.get(key)
        value = len(value) if isinstance(value, list) else value  # near ties are listed one by one
        return "–" if value is None else format(value, form)

    sigmas = [number(key, ".1e") for key in ("worst_sigma", "mean_sigma", "limit")]
    return (
        scenario.get("name", "?"),
        number("rows", ""),
        number("positions", ""),
        *sigmas,
        number("top1_agree", ".4f"),
        number("near_ties", ""),
        number("seconds", ".2f"),
        _verdict(scenario),
    )


def _verdict(scenario: Mapping[str, Any]) -> str:
    status, reason = str(scenario.get("status", "–")).replace("_", " "), scenario.get("reason")
    if status == "passed" and reason and not scenario.get("positions"):
        return "passed: refused, as it must be"  # why is in the report: the line would break
    return f"{status}: {reason}" if reason and status != "passed" else status


def stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """Return the stages of a report as a table."""
    rows = [(stage.get("name", "?"), f"{stage.get('seconds') or 0:.1f}", size(stage.get("peak_rss_bytes"))) for stage in stages]
    return table(("stage", "seconds", "peak memory"), rows)


QUALITY = (
    "model",
    "KL mean",
    "KL worst",
    "top-1",
    "near ties",
    "perplexity",
    "original's",
    "ratio",
    "greedy tokens",
    "cosine, mean",
    "cosine, worst",
)


def quality_rows(quality: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of what was measured of a model's quality; columns that nothing was measured for are left out."""
    forms = {"kl_mean": ".2e", "kl_worst": ".2e", "top1_agree": ".4f", "near_ties": "", "perplexity": ".3f", "original_perplexity": ".3f",
             "perplexity_ratio": ".4f", "greedy": "", "cosine_mean": ".6f", "cosine_worst": ".6f"}  # fmt: skip
    rows = []
    for row in quality.get("measured", ()):
        greedy = f"{row['greedy_matched']} of {row['greedy_tokens']}" if row.get("greedy_tokens") else None
        values = {**row, "greedy": greedy, "near_ties": row.get("near_ties") if row.get("top1_agree") is not None else None}
        cells = ("–" if values.get(key) is None else format(values[key], form) for key, form in forms.items())
        rows.append((str(row.get("name", "?")), *cells))
    used = [at for at in range(len(QUALITY)) if not at or any(row[at] != "–" for row in rows)]
    return tuple(QUALITY[at] for at in used), [tuple(row[at] for at in used) for row in rows]


def quality_title(quality: Mapping[str, Any]) -> str:
    """Return what the quality was measured on, and the size of what has it."""
    tokens, count = quality.get("tokens", 0), quality.get("rows", 0)
    rows = f"{tokens:,} tokens in {count} rows" if tokens else f"{count} of them"
    limits = [f"max_kl {quality['max_kl']:g}"] if quality.get("max_kl") is not None else []
    limits += [f"max_size {size(quality['max_size'])}"] if quality.get("max_size") else []
    return "; ".join([f"quality on {quality.get('text')}: {rows}", f"graph and weights {size(quality.get('size_bytes'))}", *limits])


def promoted_rows(quality: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the layers that got more bits, first those that told most."""
    header = ("promoted", "from", "to", "KL of it alone")
    return header, [(row["layer"], row["from"], row["to"], f"{row['sensitivity']:.2e}") for row in quality.get("promoted", ())]


def step_rows(quality: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of what was tried: so many layers promoted, and the KL divergence with them."""
    header = ("layers tried", "to", "KL mean")
    return header, [(str(row["layers"]), row["to"], f"{row['kl_mean']:.2e}") for row in quality.get("steps", ())]


def sensitivity_rows(quality: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of what each layer's integers alone cost."""
    header = ("layer", "stored as", "loss by it alone")
    return header, [(row["layer"], row["stored"], f"{row['loss']:.2e}") for row in quality.get("sensitivity", ())]


def quality_tables(quality: Mapping[str, Any]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return header and rows of every table of a report's quality that has rows."""
    tables = (make(quality) for make in (quality_rows, sensitivity_rows, step_rows, promoted_rows))
    return [(header, rows) for header, rows in tables if rows]


def quality_text(quality: Mapping[str, Any]) -> str:
    """Return the tables of a report's quality under what it was measured on."""
    return "\n\n".join([quality_title(quality), *(table(header, rows) for header, rows in quality_tables(quality))])


def report_text(report: Mapping[str, Any]) -> str:
    """Return the tables of a report.json that has them."""
    parts = []
    if report.get("scenarios"):
        parts.append(parity_table(report["scenarios"]))
    if report.get("quality"):
        parts.append(quality_text(report["quality"]))
    if report.get("choice"):
        parts.append(choice_table(report["choice"]))
    if report.get("stages"):
        parts.append(stage_table(report["stages"]))
    return "\n\n".join(parts)


def choice_table(choice: Mapping[str, Any]) -> str:
    """Return what was measured of each candidate, the one that was picked first, and why others were left out."""
    rows: list[Row] = []
    for row in sorted(choice["candidates"], key=lambda row: row.get("cost_ms", math.inf)):
        name = f"{row['target']} (picked)" if row["target"] == choice["picked"] else row["target"]
        if "error" in row:
            rows.append((name, "–", "–", "–", "–", row["error"]))
            continue
        step = row.get("tpot_ms") or {}
        first, each = row.get("ttft_ms", {}).get("median"), step.get("median", row.get("call_ms", {}).get("p50"))
        rows.append(
            (name, *(f"{ms:.2f}" if ms is not None else "–" for ms in (row["cost_ms"], first, each)), size(row["peak_rss_bytes"]), "")
        )
    return table(("candidate", f"ms by {choice['judged_by']}", "first token", "each", "peak memory", "left out because"), rows)


def plan_text(plan: Mapping[str, Any]) -> str:
    """Return a plan as text: what is known first, then every problem with its place and its fix."""
    rows = [(key.replace("_bytes", "").replace("_", " "), _plan_value(key, value)) for key, value in plan.items() if key != "problems"]
    width = max((len(label) for label, _ in rows), default=0)
    lines = [f"{label.ljust(width)}  {value}" for label, value in rows]
    problems = plan.get("problems") or []
    lines.append(f"{'problems'.ljust(width)}  {len(problems) or 'none'}")
    lines += [f"  {_problem(problem)}" for problem in problems]
    return "\n".join(lines)


def _plan_value(key: str, value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return size(value) if "bytes" in key else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plan_value(key, item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def _problem(problem: Mapping[str, Any]) -> str:
    place = " · ".join(str(problem[key]) for key in ("node", "module", "source") if problem.get(key))
    why = f": {problem['why']}" if problem.get("why") else ""
    fix = f"; {problem['fix']}" if problem.get("fix") else ""
    return f"{place}{why}{fix}"
