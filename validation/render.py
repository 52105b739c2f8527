"""Every format that a report can be read in, by the name that the command line gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from calque.choices import ReportFormat
from calque.validation import render_html, render_json, render_junit, render_markdown
from calque.validation.cells import Cell, read_cells

RENDERERS: dict[ReportFormat, Callable[[Sequence[Cell]], str]] = {
    "markdown": render_markdown.render,
    "html": render_html.render,
    "junit": render_junit.render,
    "json": render_json.render,
}


def report(folders: Sequence[Path], form: ReportFormat) -> str:
    """Return the report of every artifact in the folders, in that format; torch is not needed.

    Raises:
        ArtifactUnreadable: what is no artifact, and no run over many either.
    """
    return RENDERERS[form](read_cells(folders))
