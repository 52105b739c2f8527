from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from calque import staging as staging_module
from calque.errors import CalqueError, ParityFailed, UsageError, WontFit
from calque.staging import check_output, staging
from tests.calque.artifact_folder import content, names, write_artifact


def convert(out: Path, written: str, error: BaseException | None = None) -> None:
    """Do what a conversion does to its output folder, ending in ``error``."""
    with staging(out, force=True) as folder:
        write_artifact(folder, written)
        if error is not None:
            raise error


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "_exchange", lambda first, second: False)


def test_success_gives_the_folder_its_name(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staging(out) as folder:
        assert folder.parent == out.parent
        assert folder.name.startswith(".out.calque-staging-")
        assert not out.exists()
        write_artifact(folder, "new")
    assert content(out) == "new"
    assert names(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_force_replaces_an_artifact_in_one_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    with staging(out, force=True) as folder:
        write_artifact(folder, "new")
        assert content(out) == "old"
    assert content(out) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("without_exchange")
def test_force_replaces_where_the_filesystem_cannot_exchange(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    with staging(out, force=True) as folder:
        write_artifact(folder, "new")
    assert content(out) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("without_exchange")
def test_a_failed_second_rename_brings_the_older_artifact_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if "staging" in path.name:
            raise PermissionError(errno.EPERM, "not now", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UsageError, match="cannot be written"), staging(out, force=True) as folder:
        write_artifact(folder, "new")
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


def test_what_was_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(tmp_path / ".out.calque-previous-0123abcd", "old")
    write_artifact(tmp_path / ".out.calque-staging-0123abcd", "half")
    with pytest.raises(UsageError, match="exists already"), staging(out):
        pytest.fail("the block must not run")
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_exchange_says_no_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class Library:
        def renameat2(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
    monkeypatch.setattr(ctypes, "get_errno", lambda: code)
    assert staging_module._exchange(tmp_path / "a", tmp_path / "b") is False


def test_exchange_reports_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        staging_module._exchange(tmp_path / "a", tmp_path / "b")


def test_an_existing_folder_needs_force_and_nothing_is_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    with pytest.raises(UsageError, match="exists already") as caught, staging(out):
        pytest.fail("the block must not run")
    assert "--force" in caught.value.fix
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("kind", ["file", "empty folder", "other folder", "other manifest", "broken manifest"])
def test_what_is_no_artifact_is_never_replaced_and_no_flag_is_said_to_help(tmp_path: Path, kind: str, force: bool) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
    if kind == "other folder":
        (out / "precious").write_text("x")
    if kind.endswith("manifest"):
        (out / "manifest.json").write_text('{"name": "a web app"}' if kind == "other manifest" else "{")
    before = out.stat()
    with pytest.raises(UsageError, match="is not an artifact") as caught, staging(out, force):
        pytest.fail("the block must not run")
    assert "--" not in str(caught.value)
    assert out.stat().st_ino == before.st_ino
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [True, False])
def test_an_artifact_that_holds_files_of_others_is_never_replaced(tmp_path: Path, force: bool) -> None:
    write_artifact(tmp_path / "out", "old")
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UsageError, match="holds files that are not the artifact's") as caught:
        check_output(tmp_path / "out", force)
    assert caught.value.where == ("precious",)
    assert "--" not in str(caught.value)


def test_the_root_folder_is_no_output() -> None:
    with pytest.raises(UsageError, match="cannot be an artifact folder"):
        check_output(Path("/"))


def test_a_link_to_an_artifact_keeps_pointing_at_it(tmp_path: Path) -> None:
    write_artifact(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    with staging(tmp_path / "current", force=True) as folder:
        write_artifact(folder, "new")
    assert (tmp_path / "current").is_symlink()
    assert content(tmp_path / "v1") == "new"


def test_a_failed_proof_makes_a_rejected_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    for attempt in ("first", "second"):
        with pytest.raises(ParityFailed):
            convert(out, attempt, ParityFailed("wrong numbers"))
        assert content(tmp_path / "out.rejected") == attempt
    assert content(out) == "old"
    assert names(tmp_path) == ["out", "out.rejected"]


@pytest.mark.usefixtures("without_exchange")
def test_a_rejected_folder_is_replaced_without_exchange_too(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        with pytest.raises(ParityFailed):
            convert(tmp_path / "out", attempt, ParityFailed("wrong numbers"))
    assert content(tmp_path / "out.rejected") == "second"
    assert names(tmp_path) == ["out.rejected"]


def test_a_foreign_rejected_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.rejected").mkdir()
    (tmp_path / "out.rejected" / "precious").write_text("x")
    with pytest.raises(UsageError, match=r"out\.rejected is in the way"), staging(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path / "out.rejected") == ["precious"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(3)])
def test_any_other_end_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    with pytest.raises(type(error)):
        convert(out, "half", error)
    assert content(out) == "old"
    assert names(tmp_path) == ["out"]


def test_two_conversions_cannot_write_the_same_folder(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as folder:
        with pytest.raises(UsageError, match="another conversion is writing"), staging(tmp_path / "out"):
            pytest.fail("the block must not run")
        with staging(tmp_path / "other") as other:
            write_artifact(other, "other")
        write_artifact(folder, "mine")
    assert names(tmp_path) == ["other", "out"]


def test_someone_elses_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="exists already"), staging(out):
        out.write_text("precious")
    assert out.read_text() == "precious"
    assert names(tmp_path) == ["out"]


def someone_puts_files_in(folder: Path) -> None:
    folder.mkdir()
    (folder / "precious").write_text("x")


@pytest.mark.parametrize("force", [True, False])
def test_someone_elses_files_that_appear_meanwhile_are_never_deleted(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError), staging(out, force):
        someone_puts_files_in(out)
    assert names(out) == ["precious"]
    assert names(tmp_path) == ["out"]


def test_foreign_rejected_folder_that_appears_meanwhile_is_never_deleted(tmp_path: Path) -> None:
    def fail() -> None:
        someone_puts_files_in(tmp_path / "out.rejected")
        raise ParityFailed("wrong numbers")

    with pytest.raises(UsageError, match="is in the way"), staging(tmp_path / "out"):
        fail()
    assert names(tmp_path / "out.rejected") == ["precious"]
    assert names(tmp_path) == ["out.rejected"]


def replace_by(folder: Path, replacement: str) -> None:
    moved = folder.with_name("moved")
    folder.rename(moved)  # kept until the other exists, so that the other is not given its inode
    if replacement == "a folder":
        folder.mkdir()
    if replacement == "a file":
        folder.touch()
    moved.rmdir()


@pytest.mark.parametrize(("replacement", "lost"), [("nothing", "removed"), ("a file", "replaced"), ("a folder", "replaced")])
def test_staging_folder_that_others_took_away_is_said_so(tmp_path: Path, replacement: str, lost: str) -> None:
    with pytest.raises(CalqueError, match=f"was {lost} while"), staging(tmp_path / "out") as folder:
        replace_by(folder, replacement)
    assert names(tmp_path) == []


def test_success_removes_the_rejected_folder_of_an_earlier_attempt(tmp_path: Path) -> None:
    with pytest.raises(ParityFailed):
        convert(tmp_path / "out", "first", ParityFailed("wrong numbers"))
    convert(tmp_path / "out", "second")
    assert names(tmp_path) == ["out"]


def test_success_keeps_a_rejected_folder_that_holds_files_of_someone(tmp_path: Path) -> None:
    with pytest.raises(ParityFailed):
        convert(tmp_path / "out", "first", ParityFailed("wrong numbers"))
    (tmp_path / "out.rejected" / "notes.txt").write_text("x")
    convert(tmp_path / "out", "second")
    assert names(tmp_path) == ["out", "out.rejected"]


def test_folders_made_for_the_output_go_when_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="bug"):
        convert(tmp_path / "deep" / "er" / "out", "half", RuntimeError("bug"))
    assert names(tmp_path) == []
    with pytest.raises(ParityFailed):
        convert(tmp_path / "deep" / "er" / "out", "wrong", ParityFailed("wrong numbers"))
    assert names(tmp_path / "deep" / "er") == ["out.rejected"]


@pytest.mark.parametrize("error", [OSError(errno.EFBIG, "File too large"), OSError("27008 requested and 992 written")])
def test_file_that_may_not_grow_is_wont_fit(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(WontFit), staging(tmp_path / "out"):
        raise error


# Refusals of the operating system.


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder on a disk of 1 MB: a real one where the tests may mount it, else one that refuses large writes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False)
    if mount.returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return

    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    yield disk


def test_a_full_disk_is_wont_fit(full_disk: Path) -> None:
    out = full_disk / "out"
    write_artifact(out, "old")
    with pytest.raises(WontFit, match="is full") as caught, staging(out, force=True) as folder:
        (folder / "model.onnx").write_bytes(b"\0" * 2**22)
    assert caught.value.exit_code == 6
    assert "MB free" in caught.value.where[0]
    assert content(out) == "old"
    assert names(full_disk) == ["out"]


@pytest.mark.parametrize("as_cause", [True, False])
def test_a_full_disk_that_a_library_wrapped_is_wont_fit(tmp_path: Path, as_cause: bool) -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            if as_cause:
                raise RuntimeError("enforce failed") from error
            raise RuntimeError("enforce failed")  # noqa: B904, what libraries do

    with pytest.raises(WontFit), staging(tmp_path / "out"):
        write()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="cannot be written") as caught, staging(tmp_path / "new" / "out"):
        pytest.fail("the block must not run")
    assert str(tmp_path / "new") in str(caught.value)


def test_a_folder_above_the_parent_that_may_not_be_written_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path, *__: object, **___: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "new"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="cannot be written"), staging(tmp_path / "new" / "deeper" / "out"):
        pytest.fail("the block must not run")


def test_a_folder_that_nothing_can_be_made_in_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="/proc cannot be written"), staging(Path("/proc/out")):
        pytest.fail("the block must not run")


def test_a_parent_that_is_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be written"), staging(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_a_name_too_long_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"), staging(tmp_path / ("x" * 250)):
        pytest.fail("the block must not run")


def test_refusals_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    elsewhere = "/proc/1/elsewhere"
    with pytest.raises(PermissionError), staging(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", elsewhere)
    assert not issubclass(PermissionError, CalqueError)


def test_force_does_not_delete_files_that_the_artifact_does_not_know(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(out, "old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not the artifact's") as caught, staging(out, force=True):
        pytest.fail("the block must not run")
    assert caught.value.where == ("notes.txt",)
    assert (out / "notes.txt").read_text() == "mine"
