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


def quality() -> dict[str, Any]:
    measured = {"positions": 9, "kl_mean": 0.0111, "kl_worst": 0.5, "top1_agree": 0.94, "near_ties": 1, "perplexity": 12.88,
                "original_perplexity": 12.76, "perplexity_ratio": 1.0094, "greedy_matched": 44, "greedy_tokens": 128}  # fmt: skip
    row = {"layer": "model.layers.3", "from": "int4", "to": "int8", "sensitivity": 3.7e-3}
    return {
        "text": "heldout.txt", "random": False, "rows": 29, "tokens": 29442, "size_bytes": 3_461_583, "max_kl": 0.012, "max_size": None,
        "measured": [{"name": "weights alone", **measured}, {"name": "artifact", **measured, "perplexity": None}],
        "sensitivity": [{"layer": "model.layers.3", "stored": "int4", "loss": 3.7e-3}],
        "promoted": [row], "steps": [{"to": "int8", "layers": 1, "kl_mean": 0.0111}],
    }  # fmt: skip


def test_quality_is_shown_with_its_text_its_size_and_its_limit() -> None:
    text = report_text({"quality": quality()})
    assert text.startswith("quality on heldout.txt: 29,442 tokens in 29 rows; graph and weights 3.5 MB; max_kl 0.012\n")
    assert re.search(r"weights alone +1\.11e-02 +5\.00e-01 +0\.9400 +1 +12\.880 +12\.760 +1\.0094 +44 of 128\n", text)
    assert re.search(r"artifact +1\.11e-02 +5\.00e-01 +0\.9400 +1 +– +12\.760", text)
    assert "cosine" not in text  # nothing was measured of it
    assert re.search(r"model\.layers\.3 +int4 +3\.70e-03", text)
    assert re.search(r"model\.layers\.3 +int4 +int8 +3\.70e-03", text)


def test_quality_of_an_encoder_has_its_own_columns() -> None:
    row = {"name": "weights alone", "kl_mean": None, "near_ties": 0, "cosine_mean": 0.998, "cosine_worst": 0.99}
    text = report_text({"quality": {"text": "random tokens", "rows": 5, "tokens": 320, "size_bytes": 10, "measured": [row]}})
    assert re.search(r"model +cosine, mean +cosine, worst\n", text)
    assert "0.998000" in text


def test_a_plan_is_shown_whatever_it_holds() -> None:
    text = plan_text(
        {"passes": ["a", "b"], "peak_memory_bytes": {"convert": 10**9, "prove": 2 * 10**9}, "exact": True, "limits": {"max": None}}
    )
    assert "passes       a, b\n" in text
    assert "peak memory  convert 1 GB, prove 2 GB\n" in text
    assert "exact        True\n" in text
    assert "limits       max –\n" in text
    assert text.endswith("problems     none")
