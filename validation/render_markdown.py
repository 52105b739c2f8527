"""A report as Markdown for the summary page of a CI job: short, failures first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from calque.console import quality_tables, quality_title
from calque.validation.cells import Cell, ordered

# GitHub refuses summaries of more than 1 MiB; a reason may hold a runtime's whole log.
LONGEST = 300
MOST_LINES = 10

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "#": "&#35;", ":": "&#58;", ".": "&#46;"}
# A colon or a dot is escaped in what GitHub would make a link of, a dash or a plus where it would begin a list.
_SPECIAL = re.compile(r"[\\`*_{}\[\]|~$]|[&<>@#]|:(?=//)|(?<=www)\.|^[-+]")


def render(cells: Sequence[Cell]) -> str:
    """Return a table of the artifacts, if there are several, and for each its verdict and its scenarios."""
    parts = [_overview(cells)] if len(cells) > 1 else []
    parts += [_artifact(cell, folded=len(cells) > 1) for cell in ordered(cells)]
    return "\n\n".join(parts) + "\n"


def _overview(cells: Sequence[Cell]) -> str:
    failed = sum(cell.status == "failed" for cell in cells)
    rows = [
        (escape(cell.name), _sigma(cell.worst_sigma), "–" if cell.seconds is None else f"{cell.seconds:.1f}", _verdict(cell.status))
        for cell in ordered(cells)
    ]
    heading = f"## Calque: {failed} of {len(cells)} failed" if failed else f"## Calque: {len(cells)} artifacts, none failed"
    return f"{heading}\n\n" + _table(("artifact", "worst σ", "seconds", "status"), "lrrl", rows)


def _artifact(cell: Cell, folded: bool) -> str:
    title = escape(cell.title if cell.title == cell.name or not folded else f"{cell.name}: {cell.title}")
    parts = [f"### {title}: {_verdict(cell.status)}"]
    if cell.error:
        code = f" (exit {cell.error['exit_code']})" if cell.error.get("exit_code") is not None else ""
        lines = [f"**{escape(cell.error['type'])}**{code}: {escape(cell.error['what'])}", *_items(cell.error["where"])]
        parts.append("\n".join(lines + ([f"\nFix: {escape(cell.error['fix'])}"] if cell.error["fix"] else [])))
    if cell.worst_sigma is not None:
        limit = f", limit {_sigma(cell.limit)} σ" if cell.limit is not None else ""
        parts.append(f"Worst {_sigma(cell.worst_sigma)} σ{limit}; {len(cell.report.scenarios)} scenarios; {cell.seconds or 0:.1f} s.")
    if cell.findings:
        parts.append("\n".join(_items(cell.findings)))
    if cell.report.notes:
        parts.append("\n".join(_items(cell.report.notes)))
    if quality := cell.report.quality:
        parts.append(escape(quality_title(quality)))
        parts += [_cells(header, rows) for header, rows in quality_tables(quality)]
    if cell.report.scenarios:
        parts.append(_scenarios(cell, folded and cell.status != "failed"))
    return "\n\n".join(parts)


def _scenarios(cell: Cell, folded: bool) -> str:
    rows = [(escape(row["name"]), _sigma(row.get("worst_sigma")), _sigma(row["limit"]), _outcome(row)) for row in cell.scenarios]
    table = _table(("scenario", "worst σ", "limit σ", "status"), "lrrl", rows)
    return f"<details><summary>{len(rows)} scenarios</summary>\n\n{table}\n\n</details>" if folded else table


def _cells(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _table(header, "l" + "r" * (len(header) - 1), [[escape(cell) for cell in row] for row in rows])


def _outcome(row: Mapping[str, Any]) -> str:
    ties = f", {len(row['near_ties'])} near ties" if row.get("near_ties") else ""
    reason = f": {escape(row['reason'])}" if row.get("reason") else ""
    return f"{_verdict(row['status'])}{ties}{reason}"


def _verdict(status: str) -> str:
    return "**failed**" if status == "failed" else status.replace("_", " ")


def _sigma(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _items(lines: Sequence[str]) -> list[str]:
    more = [f"- … and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return [f"- {escape(line)}" for line in lines[:MOST_LINES]] + more


def _table(header: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> str:
    ruler = ["--:" if side == "r" else "---" for side in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))


def escape(value: object) -> str:
    """Return the value as one line that reads as it is written: no markup, link or formula comes of it."""
    text = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), text)
