from __future__ import annotations

import io
import re
from typing import Any

import pytest

from calque.console import LiveText, Progress, parity_table, plan_text, report_text, size, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress("trace")
        progress("passes [1/2]")
    assert re.fullmatch(r"\[ +\d+\.\ds\] trace …\n\[ +\d+\.\ds\] passes \[1/2\] …\n", stream.getvalue())


def test_progress_on_a_terminal_keeps_one_line_for_each_stage_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(stream) as progress:
        progress("trace")
        progress("passes [1/2]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert len(re.findall(r"\d+\.\ds  trace", text)) == 1
    assert len(re.findall(r"\d+\.\ds  passes \[1/2\]", text)) == 1


def test_a_stage_that_failed_is_not_shown_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()

    def fail() -> None:
        with Progress(stream) as progress:
            progress("trace")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not re.search(r"\d+\.\ds  trace", stream.getvalue())
    assert stream.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in stream.getvalue()  # the cursor is shown again


def test_a_text_that_grows_is_shown_once() -> None:
    stream = io.StringIO()
    live = LiveText(stream)
    shown = []
    for text in ("one", "one t", "one t\ufffd", "one té", "one té"):
        live(text)
        shown.append(stream.getvalue())
    live.end("one té.")
    assert shown == ["one", "one t", "one t", "one té", "one té"]
    assert stream.getvalue() == "one té.\n"


def test_a_text_that_is_taken_back_is_shown_whole_at_the_end() -> None:
    stream = io.StringIO()
    live = LiveText(stream)
    for text in ("a b", "ab"):
        live(text)
    live.end("abc")
    assert stream.getvalue() == "a b\nabc\n"


def test_columns_are_aligned_and_numbers_stand_at_the_right() -> None:
    lines = table(("name", "count"), [("a", 5), ("long name", 1234), ("b", "–")]).splitlines()
    assert lines == ["name       count", "─────────  ─────", "a              5", "long name   1234", "b              –"]


def test_an_empty_table_is_its_header() -> None:
    assert table(("a", "b"), []).splitlines()[0] == "a  b"


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (11_800_000, "11.8 MB"), (2 * 10**9, "2 GB"), (3.5e12, "3.50 TB")],
)
def test_sizes_are_decimal(count: float | None, text: str) -> None:
    assert size(count) == text


def test_missing_figures_are_dashes_and_reasons_are_told() -> None:
    row = {"name": "nan", "worst_sigma": None, "near_ties": [{"position": 3}], "status": "failed", "reason": "row 0 is NaN"}
    left_out = {"name": "long", "status": "not_run", "reason": "no window"}
    lines = parity_table([row, left_out]).splitlines()
    assert lines[2].split() == ["nan", "–", "–", "–", "–", "–", "–", "1", "–", "failed:", "row", "0", "is", "NaN"]
    assert lines[3].endswith("not run: no window")


@pytest.mark.parametrize("report", [{}, {"scenarios": [], "stages": []}])
def test_a_report_without_rows_is_no_text(report: dict[str, Any]) -> None:
    assert report_text(report) == ""


def test_a_plan_is_shown_whatever_it_holds() -> None:
    text = plan_text(
        {"passes": ["a", "b"], "peak_memory_bytes": {"convert": 10**9, "prove": 2 * 10**9}, "exact": True, "limits": {"max": None}}
    )
    assert "passes       a, b\n" in text
    assert "peak memory  convert 1 GB, prove 2 GB\n" in text
    assert "exact        True\n" in text
    assert "limits       max –\n" in text
    assert text.endswith("problems     none")
