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
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from calque.artifact import MANIFEST, REPORT, unlisted_files
from calque.errors import CalqueError, ParityFailed, UsageError, WontFit
from calque.interrupts import raise_if_interrupted, terminations_as_interrupts

# Linux, <linux/fs.h> and <fcntl.h>.
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_TOO_LARGE = {errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_IN_THE_WAY = {errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENAMETOOLONG, errno.ENOLCK}
_CANNOT_FLAG = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


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
    with _explained(out), terminations_as_interrupts(), _parents_of(out), _locked(out):
        _clear_leftovers(out)
        check_output(out, force)
        folder = _sibling(out, "staging")
        folder.mkdir()
        made = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # held open, so that nothing else is given its inode
        try:
            yield folder
            raise_if_interrupted()
        except ParityFailed:
            # An older rejected folder is worth nothing: named like a leftover, it is removed as one.
            _publish(folder, made, rejected_folder(out), aside=_sibling(out, "staging"), check=_check_rejected)
            raise
        except Exception:
            _require_own(folder, made)
            raise
        else:
            _publish(folder, made, out, aside=_sibling(out, "previous"), check=lambda there: check_output(there, force))
            _drop_rejected(rejected_folder(out))
        finally:
            # Published: the path is free, or holds what was exchanged for the new folder.
            _remove(folder)
            os.close(made)


def check_output(out: Path, force: bool = False) -> None:
    """Leave quietly if a conversion may write ``out``.

    Raises:
        UsageError: something is there that may not be replaced; nothing was touched.
    """
    out = Path(os.path.realpath(out))
    if not out.name:
        raise UsageError(f"{out} cannot be an artifact folder", fix="name a folder inside it: -o FOLDER")
    if os.path.lexists(out):
        # First what neither --force nor --resume helps against.
        if not is_artifact(out):
            fix = "name another folder with -o, or remove this one yourself"
            raise UsageError(f"{out} exists already and is not an artifact; only artifacts are ever replaced", fix=fix)
        if added := _added_files(out):
            what = f"{out} exists already and holds files that are not the artifact's, which replacing it would delete"
            raise UsageError(what, added, "name another folder with -o, or move these files away first")
        if not force:
            fix = "name another folder with -o, replace it with --force, or keep it with --resume if it is proved already"
            raise UsageError(f"{out} exists already", fix=fix)
    _check_rejected(rejected_folder(out))


def _check_rejected(rejected: Path) -> None:
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
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"schema", "target", "recipe"} <= manifest.keys() and isinstance(manifest.get("files"), dict)


def _added_files(folder: Path) -> list[str]:
    """Return the files in an artifact's folder that its manifest does not list."""
    return unlisted_files(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])


def _sibling(out: Path, role: str) -> Path:
    return out.with_name(f".{out.name}.calque-{role}-{secrets.token_hex(4)}")


def _is_leftover(rejected: Path) -> bool:
    """Return whether a rejected folder without a manifest is one: the proof failed before the manifest was written."""
    return rejected.is_dir() and ((rejected / REPORT).is_file() or not any(rejected.iterdir()))


def _require_own(folder: Path, made: int) -> None:
    """Leave quietly if the folder is the one that was made; ``made`` is its descriptor.

    Raises:
        CalqueError: another program removed it, or put something else there.
    """
    try:
        if os.path.samestat(os.fstat(made), folder.lstat()):
            return
    except OSError as error:
        lost = f"{folder} was removed while it was written: {error.strerror}"
    else:
        lost = f"{folder} was replaced while it was written"
    raise CalqueError(lost, fix="run it again, and let nothing else change the folder that the output goes to")


def _remove(path: Path) -> None:
    """Leave nothing at the path, as far as the system allows; what remains is a leftover for the next conversion."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _drop_rejected(rejected: Path) -> None:
    """Leave no rejected folder beside the artifact that took its place, unless it holds files that are not its own."""
    if is_artifact(rejected) and not _added_files(rejected):
        shutil.rmtree(rejected, ignore_errors=True)


@contextlib.contextmanager
def _parents_of(out: Path) -> Iterator[None]:
    """Have the folders above ``out``; those that were made for it go again unless something came to lie in them."""
    missing = [folder for folder in out.parents if not os.path.lexists(folder)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            try:
                folder.rmdir()
            except OSError:
                break  # it holds what was written, or was never made


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the only lock on ``out``; the kernel lets go of it when the process dies, however it dies."""
    path = out.with_name(f".{out.name}.calque-lock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError as error:
            if not out.parent.is_dir():  # another conversion that made the folder has just taken it away
                out.parent.mkdir(parents=True, exist_ok=True)
                continue
            # The folder is there: it is one that nothing can be made in, as /proc.
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
            _remove(previous)
    for path in siblings:
        if path.name.startswith(f"{prefix}staging-"):
            _remove(path)


def _publish(folder: Path, made: int, destination: Path, aside: Path, check: Callable[[Path], None]) -> None:
    """Give ``folder`` the name ``destination``, all at once and on disk; what was there is then at ``folder``, or gone.

    ``check``: raises unless what lies at a path may be replaced. Asked after the files were synced, which takes seconds,
    and of what was got in exchange: what came there at the last moment is someone else's and goes back.
    """
    _require_own(folder, made)
    _sync(folder)
    check(destination)
    if not os.path.lexists(destination):
        _rename_to_nothing(folder, destination, check)
    elif not _exchange(folder, destination):
        _rename_twice(folder, destination, aside)
    else:
        try:
            check(folder)
        except UsageError:
            _exchange(folder, destination)
            check(destination)  # the same refusal, with the name that the user knows
            raise
    _sync_one(destination.parent)


def _rename_to_nothing(folder: Path, destination: Path, check: Callable[[Path], None]) -> None:
    """Give ``folder`` a name that nothing has; where the system cannot promise that, a moment is left to others."""
    try:
        if not _rename(folder, destination, _RENAME_NOREPLACE):
            folder.rename(destination)
    except FileExistsError:
        check(destination)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Return whether two names were exchanged in one step; False where the system or the filesystem cannot."""
    return _rename(first, second, _RENAME_EXCHANGE)


def _rename(first: Path, second: Path, flag: int) -> bool:
    """Return whether ``first`` was renamed to ``second`` as the flag says; False where the system or the filesystem cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_FLAG:
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
        if refusal.errno in _TOO_LARGE:
            fix = "raise the limit (`ulimit -f`), or name a folder on a filesystem that takes larger files"
            raise WontFit(f"a file in {where.parent if refusal.filename else out.parent} may not grow any further", fix=fix) from error
        if refusal.errno in _NO_SPACE or _is_short_write(refusal):
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
        if isinstance(error, OSError) and (error.errno in _NO_SPACE | _TOO_LARGE | _NOT_ALLOWED | _IN_THE_WAY or _is_short_write(error)):
            return error
        full = isinstance(error.__context__, OSError) and error.__context__.errno in _NO_SPACE | _TOO_LARGE
        error = error.__context__ if full else error.__cause__
    return None


def _is_short_write(error: OSError) -> bool:
    """Return whether numpy says that not all bytes of an array reached the file: it drops the system's reason, a full disk or a limit."""
    said = r"\d+ requested and \d+ written|Not enough free space to write \d+ bytes.*"
    return error.errno is None and bool(re.fullmatch(said, str(error)))


def _is_staged(path: Path) -> bool:
    return any(".calque-staging-" in parent.name for parent in path.parents)


def _space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{folder}  {shutil.disk_usage(folder).free / 1e6:,.0f} MB free after the unfinished folder was removed"
