"""Medians of the records, and the Markdown that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.conversion.records import Cost, Record
from benchmarks.conversion.tools import CALQUE

WHOLE, ALONE, PROOF = f"{CALQUE}, conversion and proof", f"{CALQUE}, conversion alone", f"{CALQUE}, proof"

TITLE = "Conversion side by side"
NOTES = """\
Each figure is the median of its column over the runs that succeeded. Wall and CPU seconds, user and system, are of the whole tree of
processes; peak RSS is summed over the tree, sampled every 20 ms, pages of mapped files included. *Conversion alone* is everything
but the stages in which Calque compares the artifact with the eager model: the process start, imports, and the final digests and sync
to disk count as conversion. Its memory is the highest of its own stages in report.json; the proof's output is the reference that the
artifact keeps. Where Calque proves the artifact over several steps, lengths and paddings, optimum runs one forward pass within what
is measured here, and the builder of onnxruntime-genai, OpenVINO's exporter and llama.cpp's converter compare nothing. All write fp32.
llama.cpp's converter does not know the tokenizer of the checkpoint and refuses those that it does not know; it is told that words are
split as GPT-2's tokenizer splits them, which is so, and does all else by itself. Ratios are the peer divided by Calque: above 1,
Calque takes less."""


@dataclass(frozen=True)
class Row:
    """One row of the table; None where nothing succeeded, or nothing is known."""

    name: str
    wall_s: float | None
    cpu_s: float | None
    peak_rss_bytes: float | None
    output_bytes: float | None
    exits: tuple[int, ...]


def rows(records: Sequence[Record]) -> list[Row]:
    """Return the rows in the order in which the tools ran; Calque as three."""
    found = []
    for tool in dict.fromkeys(record.tool for record in records):
        runs = [record for record in records if record.tool == tool]
        if tool != CALQUE:
            found.append(_row(tool, runs, lambda run: run.whole))
            continue
        parts = ((WHOLE, lambda run: run.whole), (ALONE, lambda run: run.alone), (PROOF, lambda run: run.proof))
        found += [_row(name, runs, part) for name, part in parts]
    return found


def _row(name: str, runs: Sequence[Record], part: Callable[[Record], Cost | None]) -> Row:
    done = [run for run in runs if run.exit_code == 0]
    costs = [cost for run in done if (cost := part(run)) is not None]
    return Row(
        name,
        _median([cost.wall_s for cost in costs]),
        _median([cost.cpu_s for cost in costs if cost.cpu_s is not None]),
        _median([cost.peak_rss_bytes for cost in costs]),
        _median([cost.output_bytes for cost in costs]),
        tuple(run.exit_code for run in runs),
    )


def failures(records: Sequence[Record]) -> str:
    """Return what the tools said last that failed, a line for each."""
    said = dict.fromkeys(f"- {run.tool} ended with exit code {run.exit_code}: `{run.message}`" for run in records if run.exit_code)
    return "\n".join(said)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def figures(found: Sequence[Row]) -> str:
    """Return the table of figures."""
    lines = [
        "| | wall s | CPU s | peak RSS MB | output MB | exit codes |",
        "| --- | --: | --: | --: | --: | --- |",
    ]
    for row in found:
        cells = (_cell(row.wall_s, 1), _cell(row.cpu_s, 1), _cell(row.peak_rss_bytes, 0, 1e6), _cell(row.output_bytes, 1, 1e6))
        lines.append(f"| {row.name} | {' | '.join(cells)} | {' '.join(map(str, row.exits))} |")
    return "\n".join(lines)


def ratios(found: Sequence[Row]) -> str:
    """Return the table of every peer divided by Calque, first with its proof and then without."""
    mine = {row.name: row for row in found}
    lines = [
        f"| peer ÷ {CALQUE} | wall | CPU | peak RSS | output |",
        "| --- | --: | --: | --: | --: |",
    ]
    for row in found:
        if row.name in (WHOLE, ALONE, PROOF):
            continue
        for base, words in ((WHOLE, "conversion and proof"), (ALONE, "conversion alone")):
            if base in mine:
                lines.append(f"| {row.name} ÷ {words} | {' | '.join(_ratios(row, mine[base]))} |")
    return "\n".join(lines)


def _ratios(row: Row, base: Row) -> list[str]:
    pairs = (
        (row.wall_s, base.wall_s),
        (row.cpu_s, base.cpu_s),
        (row.peak_rss_bytes, base.peak_rss_bytes),
        (row.output_bytes, base.output_bytes),
    )
    return [f"{peer / own:.2f}" if peer is not None and own else "–" for peer, own in pairs]


def _cell(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"


def markdown(results: dict[str, Any], tables: Sequence[str], title: str, notes: str) -> str:
    """Return results.md: where, with what and how it was measured, and tables for each shape."""
    machine = results["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB of memory, {machine['os']}, Linux {machine['kernel']}"
    lines = [f"# {title}", "", f"    {results['command']}", "", f"{where}.", "", notes, "", *tables]
    lines += ["## Commands and versions", ""]
    for name, tool in results["tools"].items():
        listed = ", ".join(f"{package} {version}" for package, version in tool["versions"].items())
        told = ", ".join(f"{key} {value}" for key, value in tool.get("settings", {}).items())
        lines += [f"- {name}: `{tool['command']}`{', run with ' + told if told else ''}", f"  ({listed})"]
    return "\n".join(lines) + "\n"
