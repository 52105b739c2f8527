from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from calque import cli
from tests.report_folder import write_failed, write_report

Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("form", "begin"), [("markdown", "### builtin:quill"), ("html", "<!doctype html>"), ("junit", "<?xml"), ("json", "{\n")]
)
def test_report_prints_every_format(tmp_path: Path, capsys: Output, form: str, begin: str) -> None:
    assert cli.main(["report", str(write_report(tmp_path / "quill")), "--format", form]) == 0
    assert capsys.readouterr().out.lstrip().startswith(begin)


def test_report_of_a_failed_artifact_is_no_failure_of_the_report(tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["report", str(write_failed(tmp_path / "quill.rejected"))]) == 0
    assert capsys.readouterr().out.startswith("### builtin:quill → onnxruntime, fp32: **failed**")


def test_report_is_written_to_the_file(tmp_path: Path, capsys: Output) -> None:
    folder, path = str(write_report(tmp_path / "quill")), tmp_path / "report.xml"
    assert cli.main(["report", folder, "--format", "junit", "-o", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert path.read_text(encoding="utf-8").startswith("<?xml")
    assert cli.main(["report", folder, "--format", "junit", "-o", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": "junit", "output": str(path)}


def test_json_flag_is_the_json_format_and_nothing_else(tmp_path: Path, capsys: Output) -> None:
    folder = str(write_report(tmp_path / "quill"))
    assert cli.main(["report", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifacts"][0]["name"] == "quill"
    assert cli.main(["report", folder, "--json", "--format", "html"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "UsageError"


def test_a_folder_that_is_no_artifact_is_unreadable(tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["report", str(tmp_path)]) == 7
    assert "holds neither manifest.json nor matrix.json" in capsys.readouterr().err


def test_a_format_that_there_is_not_is_bad_usage(tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["report", str(tmp_path), "--format", "htm"]) == 2
    assert "html" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["markdown", "html", "junit", "json"])
def test_report_needs_nothing_that_converting_or_running_needs(tmp_path: Path, form: str) -> None:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "pydantic")
    arguments = ["report", str(write_report(tmp_path / "quill")), "--format", form, "-o", str(tmp_path / "out")]
    loaded = f"(name for name in {heavy} if name in sys.modules)"
    code = f"import sys; from calque import cli; code = cli.main({arguments!r})\nprint(code, *{loaded})"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0"]
