from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calque import staging as staging_module
from calque.errors import UsageError
from calque.staging import staging
from tests.calque.artifact_folder import names, write_artifact


def at_the_last_moment(monkeypatch: pytest.MonkeyPatch, step: str, come: Callable[[], None]) -> None:
    """Let ``come`` happen between the last look at the output and the first ``step`` of renaming."""
    real, waiting = getattr(staging_module, step), [come]

    def late(*arguments: Any) -> Any:
        while waiting:
            waiting.pop()()
        return real(*arguments)

    monkeypatch.setattr(staging_module, step, late)


def test_what_took_the_place_of_an_artifact_at_the_last_moment_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")

    def replaced_by_someone() -> None:
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / "notes.txt").write_text("mine")

    at_the_last_moment(monkeypatch, "_exchange", replaced_by_someone)
    with pytest.raises(UsageError, match=rf"{out} exists already and is not an artifact"), staging(out, force=True) as folder:
        write_artifact(folder, "new")
    assert (out / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["moved", "out"]


def test_what_came_to_an_empty_place_at_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    at_the_last_moment(monkeypatch, "_rename_to_nothing", out.mkdir)  # empty: a plain rename would take its place
    with pytest.raises(UsageError, match="is not an artifact"), staging(out, force=True) as folder:
        write_artifact(folder, "new")
    assert names(out) == []
    assert names(tmp_path) == ["out"]
