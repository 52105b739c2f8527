from __future__ import annotations

from pathlib import Path

import pytest

from calque.errors import ArtifactUnreadable
from calque.stages import Stage
from calque.validation.report import Report


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "a.npz").write_bytes(b"123")
    report = Report.of(tmp_path, [{"name": "single-prompt", "worst_sigma": 1e-6}], [Stage("trace", 1.5, 10**9)])
    report.write(tmp_path)
    assert Report.read(tmp_path) == report
    assert report.sizes == {"reference/a.npz": 3}


@pytest.mark.parametrize("text", [None, "", "{}", '{"schema": 2}', "[]"])
def test_a_report_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtifactUnreadable, match=r"report\.json"):
        Report.read(tmp_path)
