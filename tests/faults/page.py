"""The tables of docs/faults.md, each between two marks; the rest of the page is written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.faults.workshop import ROOT

PAGE = ROOT / "docs" / "faults.md"


def write_section(name: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> None:
    """The page holds this table, and a note above it, where it held the last one of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{PAGE} has no place for {name}"
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, ["---"] * len(header), *rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    PAGE.write_text(f"{before}{begin}\n\n{note}\n\n{table}\n\n{end}{after}", encoding="utf-8")
