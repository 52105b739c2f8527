from __future__ import annotations

import json
from pathlib import Path

import pytest

from calque.errors import ArtifactUnreadable
from calque.stages import Stage
from calque.validation.report import Report
from tests.report_folder import REPORT


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "a.npz").write_bytes(b"123")
    report = REPORT.measured(tmp_path, [Stage("trace", 1.5, 10**9)])
    report.write(tmp_path)
    assert Report.read(tmp_path) == report
    assert report.sizes == {"reference/a.npz": 3}
    assert report.stages == (Stage("trace", 1.5, 10**9),)


def test_a_report_without_the_newer_keys_is_read(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": 1, "scenarios": [], "stages": [], "sizes": {"a": 1}}')
    assert Report.read(tmp_path) == Report(sizes={"a": 1})


def test_empty_sentences_are_no_notes() -> None:
    assert Report(notes=("one.",)).noted("", "two.").notes == ("one.", "two.")


@pytest.mark.parametrize("text", [None, "", "{}", '{"schema": 2}', "[]", '{"schema": 1}'])
def test_a_report_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtifactUnreadable, match=r"report\.json"):
        Report.read(tmp_path)


def test_a_key_that_no_report_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({**REPORT.data(), "colour": "red"}))
    with pytest.raises(ArtifactUnreadable, match="colour"):
        Report.read(tmp_path)
