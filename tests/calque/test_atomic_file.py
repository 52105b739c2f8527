from __future__ import annotations

import os
from pathlib import Path

import pytest

from calque.atomic_file import write_atomically
from calque.errors import UsageError


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("older")
    path.chmod(0o640)
    write_atomically(path, "σ\n")
    assert path.read_bytes() == "σ\n".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_what_stood_there_is_whole_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("older")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        write_atomically(tmp_path / "report.html", "new")
    assert (tmp_path / "report.html").read_text() == "older"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("place", [".", "missing/report.html"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match=r"is a folder|cannot be written"):
        write_atomically(tmp_path / place, "text")
