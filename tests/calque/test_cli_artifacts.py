"""The commands that read artifacts, and those that look at the installation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calque import cli
from tests.calque.artifact_folder import ROW, write_proved_artifact

Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("failed", 3)])
def test_validate_prints_the_rows(monkeypatch: pytest.MonkeyPatch, capsys: Output, status: str, code: int) -> None:
    asked = []
    failures = ["single: 3 σ"] if status == "failed" else []

    def validate(folder: Path, threads: int) -> dict[str, Any]:
        asked.append((folder, threads))
        return {"status": status, "scenarios": [ROW], "failures": failures}

    monkeypatch.setattr("calque.validation.validate.validate", validate)
    assert cli.main(["validate", "folder", "--threads", "2"]) == code
    out, err = capsys.readouterr()
    assert asked == [(Path("folder"), 2)]
    assert "1.2e-05" in out
    assert f"folder: {status}" in out
    assert err.splitlines() == failures
    assert cli.main(["validate", "folder", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["status"] == status


@pytest.mark.parametrize("speed", [None, 123.4])
def test_generate_prints_the_text_alone_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: Output, speed: float | None) -> None:
    result = {
        "text": "a continuation",
        "tokens": [1, 2, 3],
        "prompt_tokens": 4,
        "trained_length": None,
        "ttft_ms": 5.6,
        "tokens_per_s": speed,
        "max_length": None,
    }
    monkeypatch.setattr("calque.runtime.generate.generate", lambda folder, prompt, count, chat, threads, tell: result)
    assert cli.main(["generate", "folder", "-p", "text"]) == 0
    out, err = capsys.readouterr()
    assert out == "a continuation\n"
    assert err == "[4 prompt tokens, 3 new, first after 6 ms" + (", then 123.4 tokens/s]\n" if speed else "]\n")
    assert cli.main(["generate", "folder", "-p", "text", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize(
    ("prompt", "trained", "note"),
    [
        (9, 8, "note: the prompt is 9 tokens, longer than the 8 the model was trained for"),
        (7, 8, "note: prompt and answer are 10 tokens, longer than the 8 the model was trained for"),
        (6, 8, None),  # the last of the nine was never fed
        (9, None, None),
    ],
)
def test_generate_notes_what_is_longer_than_the_model_was_trained_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, prompt: int, trained: int | None, note: str | None
) -> None:
    result = {
        "text": "x",
        "tokens": [1, 2, 3],
        "prompt_tokens": prompt,
        "trained_length": trained,
        "max_length": None,
        "ttft_ms": 5.6,
        "tokens_per_s": None,
    }
    monkeypatch.setattr("calque.runtime.generate.generate", lambda *_, **__: result)
    assert cli.main(["generate", "folder", "-p", "text", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == result
    assert err.splitlines() == ([note] if note else [])


@pytest.mark.parametrize(("asked", "note"), [(16, "note: stopped after 3 tokens, at the artifact's max_length of 8"), (3, None)])
def test_generate_notes_that_the_artifacts_limit_ended_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: Output, asked: int, note: str | None
) -> None:
    result = {"text": "x", "tokens": [1, 2, 3], "prompt_tokens": 6, "trained_length": None, "max_length": 8, "ttft_ms": 5.6}
    monkeypatch.setattr("calque.runtime.generate.generate", lambda *_, **__: result)
    assert cli.main(["generate", "folder", "-p", "text", "--json", "--max-new-tokens", str(asked)]) == 0
    assert capsys.readouterr().err.splitlines() == ([note] if note else [])


@pytest.mark.parametrize("command", [["report"], ["generate", "-p", "x"], ["validate"], ["inspect"]], ids=lambda command: command[0])
def test_a_folder_that_does_not_exist_is_said_so(tmp_path: Path, capsys: Output, command: list[str]) -> None:
    assert cli.main([*command, str(tmp_path / "nosuch")]) == 7
    assert f"{tmp_path / 'nosuch'} does not exist\nFix: " in capsys.readouterr().err


def test_inspect_describes_the_artifact(tmp_path: Path, capsys: Output) -> None:
    write_proved_artifact(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "builtin:quill" in out
    assert "in   input_ids  int64 [batch_size, sequence_length]" in out
    assert "past_key_values" not in out
    assert "state  key of layers 0–1  float32 [batch_size, 2, past_sequence_length, 64]  append" in out
    assert "cache_dynamic 4" in out
    assert "model.onnx   5 B  ok" in out
    assert "notes.txt  not in the manifest" in out
    assert cli.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == {"model.onnx": {"bytes": 5, "status": "ok"}}
    assert facts["manifest"]["target"] == "onnxruntime"


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_inspect_finds_damage(tmp_path: Path, capsys: Output, damage: str) -> None:
    path = write_proved_artifact(tmp_path / "out").folder / "model.onnx"
    path.write_bytes(b"other") if damage == "changed" else path.unlink()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 7
    assert "model.onnx" in capsys.readouterr().err


def test_inspect_does_without_the_report(tmp_path: Path) -> None:
    (write_proved_artifact(tmp_path / "out").folder / "report.json").unlink()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert cli.main(["report", str(tmp_path / "out")]) == 7


def test_inspect_of_another_folder_is_unreadable(tmp_path: Path) -> None:
    assert cli.main(["inspect", str(tmp_path)]) == 7


def test_targets_says_what_each_needs(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    class Stub:
        def doctor(self) -> list[tuple[str, str, str]]:
            return [("sdk", "missing", "pip install sdk")]

    monkeypatch.setattr("calque.targets.names", lambda: ["stub"])
    monkeypatch.setattr("calque.targets.load", lambda name: Stub)
    assert cli.main(["targets"]) == 0
    assert "stub    sdk    missing  pip install sdk" in capsys.readouterr().out
    assert cli.main(["targets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"stub": [{"what": "sdk", "status": "missing", "note": "pip install sdk"}]}
