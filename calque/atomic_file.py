"""A text file that is whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from calque.errors import UsageError


def write_atomically(path: Path, text: str) -> None:
    """``path`` holds ``text``, replaced in one step and synced to disk; what stood there is whole until then.

    Raises:
        UsageError: the place is a folder, its folder is missing, or it cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.is_dir():
        raise UsageError(f"{path} is a folder", fix="name a file: -o FILE")
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}-")
    except OSError as error:
        fix = "name a file in a folder that is there and may be written"
        raise UsageError(f"{path} cannot be written: {error.strerror}", fix=fix) from error
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(_mode(path))
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", fix="free some space, or name another file") from error
    finally:
        partial.unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """Return the permissions that the file has, or that a new one would get: mkstemp's are for its owner alone."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
