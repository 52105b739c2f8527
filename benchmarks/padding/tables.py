"""The Markdown of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.padding.case import LENGTHS, SIDES, STEPS, Error

TITLE = "Padded batches side by side"
NOTES = """\
One batch of {rows} rows with {lengths} tokens, padded to the longest, through every artifact in float32: all prompts in one call, then
{steps} calls with a token of each row over the cache that the call before gave. Tokens are given, so that nobody strays from the case;
masks and positions are those of transformers' `generate`. The figures are the largest |Δ|/σ of a row's own tokens against eager
transformers on that row by itself, without padding or cache: of its prompt, then of its steps; σ is the standard deviation of the row's
logits. Rounding stays below {limit:.0e}, the limit of Calque's own proof for {layers} layers; what is above is **bold**, and wrong. The
weights are random, of a kind that makes attention sharp: a fault that is 0.1 σ here changes tokens in text as well. Calque's artifacts
run in Calque's session, which refuses what an artifact cannot do; the others have nothing to refuse with, and run in ONNX Runtime and in
OpenVINO as they are. onnxruntime-genai pads on the right by itself, and is right so; a tokenizer of transformers pads a decoder on the
left, as `generate` asks for."""


@dataclass(frozen=True)
class Outcome:
    """What one tool answered to one side: the error of each row, or the message of its refusal, or of its failure."""

    tool: str
    side: str
    errors: tuple[Error, ...] = ()
    refused: str | None = None
    failed: str | None = None

    def is_wrong(self, limit: float) -> bool:
        """Return whether a row is further from eager than rounding goes."""
        return any(error.worst > limit for error in self.errors)


def markdown(results: Mapping[str, Any], outcomes: Sequence[Outcome], causes: Mapping[str, str]) -> str:
    """Return results.md."""
    limit = results["limit"]
    notes = NOTES.format(
        rows=len(LENGTHS), lengths=", ".join(map(str, LENGTHS)), steps=STEPS, limit=limit, layers=results["shape"]["layers"]
    )
    lines = [f"# {TITLE}", "", f"    {results['command']}", "", notes, ""]
    for side in SIDES:
        lines += [f"## Padded on the {side}", "", *table([one for one in outcomes if one.side == side], limit), ""]
    lines += why(outcomes, causes, limit)
    lines += ["## Commands and versions", ""]
    for name, tool in results["tools"].items():
        listed = ", ".join(f"{package} {version}" for package, version in tool["versions"].items())
        lines += [f"- {name}: `{tool['command']}`", f"  ({listed})"]
    return "\n".join(lines) + "\n"


def table(outcomes: Sequence[Outcome], limit: float) -> list[str]:
    """Return the lines of a table: a tool in each, with prompt and steps of every row."""
    heads = [f"row of {length}: {part}" for length in LENGTHS for part in ("prompt", "steps")]
    lines = [f"| | {' | '.join(heads)} | |", f"| --- |{' --: |' * len(heads)} --- |"]
    for one in outcomes:
        cells = [_cell(value, limit) for error in one.errors for value in (error.prompt, error.steps)] or ["–"] * len(heads)
        verdict = "refused" if one.refused else "failed" if one.failed else "**wrong**" if one.is_wrong(limit) else "right"
        lines.append(f"| {one.tool} | {' | '.join(cells)} | {verdict} |")
    return lines


def why(outcomes: Sequence[Outcome], causes: Mapping[str, str], limit: float) -> list[str]:
    """Return why each tool is wrong, refuses or fails, a line for each."""
    said = {}
    for one in outcomes:
        if message := one.refused or one.failed:
            said[one.tool] = f"padding on the {one.side}: `{message}`"
        elif one.is_wrong(limit):
            said[one.tool] = causes.get(one.tool) or "cause not looked for"
    return ["## Why", "", *(f"- {tool}: {text}." for tool, text in said.items()), ""] if said else []


def _cell(value: float, limit: float) -> str:
    return f"{value:.1e}" if value <= limit else f"**{value:.2g}**"
