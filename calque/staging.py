"""An output folder that is whole or not there: work happens beside it, and one rename makes it real.

Beside ``out`` there are, while a conversion runs::

    .{name}.calque-lock              held with flock, so that two conversions never write the same folder
    .{name}.calque-staging-<random>  where files are written; what SIGKILL leaves of it is removed by the next conversion
    .{name}.calque-previous-<random> the older artifact, for the moment between two renames, where the filesystem cannot exchange
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from calque.artifact import MANIFEST, REPORT, unlisted_files
from calque.errors import CalqueError, ParityFailed, UsageError, WontFit

# Linux, <linux/fs.h> and <fcntl.h>.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENAMETOOLONG, errno.ENOLCK}
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextlib.contextmanager
def staging(out: Path, force: bool = False) -> Iterator[Path]:
    """Give a folder that becomes ``out`` when the block ends well, ``{out}.rejected`` on ParityFailed, and nothing otherwise.

    At every instant ``out`` is the whole older artifact, the whole new one, or absent where there was none.

    Raises:
        UsageError: ``out`` is in the way, cannot be written, or another conversion is writing it.
        WontFit: the disk is full.
    """
    out = Path(os.path.realpath(out))
    check_output(out, force)
    with _explained(out), terminations_as_interrupts():
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            _clear_leftovers(out)
            check_output(out, force)
            folder = _sibling(out, "staging")
            folder.mkdir()
            try:
                yield folder
            except ParityFailed:
                # An older rejected folder is worth nothing: named like a leftover, it is removed as one.
                _publish(folder, rejected_folder(out), aside=_sibling(out, "staging"))
                raise
            else:
                _publish(folder, out, aside=_sibling(out, "previous"))
            finally:
                # Published: the path is free, or holds what was exchanged for the new folder.
                shutil.rmtree(folder, ignore_errors=True)


def check_output(out: Path, force: bool = False) -> None:
    """Leave quietly if a conversion may write ``out``.

    Raises:
        UsageError: something is there that may not be replaced; nothing was touched.
    """
    out = Path(os.path.realpath(out))
    if not out.name:
        raise UsageError(f"{out} cannot be an artifact folder", fix="name a folder inside it: -o FOLDER")
    if os.path.lexists(out):
        if not force:
            raise UsageError(f"{out} exists already", fix="name another folder with -o, or replace it with --force")
        if not is_artifact(out):
            raise UsageError(
                f"{out} is not an artifact, and --force replaces artifacts only",
                fix="name another folder with -o, or remove this one yourself",
            )
        if added := unlisted_files(out, json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]):
            raise UsageError(
                f"{out} holds files that are not the artifact's, and replacing it would delete them", added, "move them away first"
            )
    rejected = rejected_folder(out)
    if os.path.lexists(rejected) and not (is_artifact(rejected) or _is_leftover(rejected)):
        raise UsageError(
            f"{rejected} is in the way and was not written by Calque: a rejected artifact would go there",
            fix="move it away, or name another folder with -o",
        )


def rejected_folder(out: Path) -> Path:
    """Return where an artifact goes that failed its proof: ``{out}.rejected``."""
    return out.with_name(out.name + ".rejected")


def is_artifact(folder: Path) -> bool:
    """Return whether the folder holds a manifest of Calque's, of any schema; other tools write a manifest.json too."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"schema", "target", "recipe", "files"} <= manifest.keys()


@contextlib.contextmanager
def terminations_as_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt while the block runs, unless the program has a handler of its own."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _sibling(out: Path, role: str) -> Path:
    return out.with_name(f".{out.name}.calque-{role}-{secrets.token_hex(4)}")


def _is_leftover(rejected: Path) -> bool:
    """Return whether a rejected folder without a manifest is one: the proof failed before the manifest was written."""
    return rejected.is_dir() and ((rejected / REPORT).is_file() or not any(rejected.iterdir()))


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the only lock on ``out``; the kernel lets go of it when the process dies, however it dies."""
    path = out.with_name(f".{out.name}.calque-lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError as error:  # the folder is there: it is one that nothing can be made in, as /proc
            raise UsageError(f"{out.parent} cannot be written", fix="name another folder with -o") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(f"another conversion is writing {out}", fix="wait for it, or name another folder with -o") from error
        except BaseException:
            os.close(descriptor)
            raise
        # Its last owner may have removed the file between our open and our lock: then the name is free for others.
        if _same_file(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _clear_leftovers(out: Path) -> None:
    """Leave no trace of a conversion that was killed; only the holder of the lock may call this."""
    prefix = f".{out.name}.calque-"
    siblings = [path for path in out.parent.iterdir() if path.name.startswith(prefix)]
    for previous in (path for path in siblings if path.name.startswith(f"{prefix}previous-")):
        if not os.path.lexists(out):
            previous.rename(out)  # killed between the two renames: the older artifact comes back
        else:
            shutil.rmtree(previous, ignore_errors=True)
    for path in siblings:
        if path.name.startswith(f"{prefix}staging-"):
            shutil.rmtree(path, ignore_errors=True)


def _publish(folder: Path, destination: Path, aside: Path) -> None:
    """Give ``folder`` the name ``destination``, all at once and on disk; what was there is then at ``folder``, or gone."""
    _sync(folder)
    if not destination.is_dir():
        folder.rename(destination)
    elif not _exchange(folder, destination):
        _rename_twice(folder, destination, aside)
    _sync_one(destination.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Return whether two names were exchanged in one step; False where the system or the filesystem cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _rename_twice(folder: Path, destination: Path, aside: Path) -> None:
    """Replace ``destination`` where names cannot be exchanged. Between the renames it is absent; the next conversion brings it back."""
    destination.rename(aside)
    try:
        folder.rename(destination)
    except BaseException:
        if not destination.exists():
            aside.rename(destination)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync_one(Path(parent, name))
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn the operating system's refusals about ``out`` into errors that say what to do; others pass."""
    try:
        yield
    except CalqueError:
        raise
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        where = Path(os.fsdecode(refusal.filename)).absolute() if refusal.filename else out
        if refusal.errno in _NO_SPACE:
            fix = "free some space, or name a folder on another disk"
            raise WontFit(f"the disk that holds {where} is full", [_space(out.parent)], fix) from error
        # Ours are what lies beside the output, and the folders above it that had to be made.
        ours = where.is_relative_to(out.parent) or out.is_relative_to(where)
        if not ours or (refusal.errno in _IN_THE_WAY and _is_staged(where)):
            raise
        raise UsageError(f"{where} cannot be written: {refusal.strerror}", fix="name another folder with -o") from error


def _refusal(error: BaseException | None) -> OSError | None:
    """Return the operating system's refusal that the error is, or that a library wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE | _NOT_ALLOWED | _IN_THE_WAY:
            return error
        full = isinstance(error.__context__, OSError) and error.__context__.errno in _NO_SPACE
        error = error.__context__ if full else error.__cause__
    return None


def _is_staged(path: Path) -> bool:
    return any(".calque-staging-" in parent.name for parent in path.parents)


def _space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{folder}  {shutil.disk_usage(folder).free / 1e6:,.0f} MB free after the unfinished folder was removed"
