"""Telling that memory ran out from the many ways in which libraries say so."""

from __future__ import annotations

import ctypes
import errno
import re

# torch, safetensors and the C++ library have no exception type for it; C code that got no memory forgets to raise any.
_SAID = re.compile(
    r"can(not|'t) allocate memory|not enough memory|out of memory|std::bad_alloc|can't start new thread"
    r"|without exception set|without setting an exception",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate (\d+) bytes", re.IGNORECASE)


def asked_for(error: BaseException) -> int | None:
    """Return the bytes that could not be had, where the error or what it was raised from says so."""
    cause: BaseException | None = error
    while cause is not None:
        if found := _ASKED.search(str(cause)):
            return int(found[1])
        cause = _before(cause)
    return None


def _before(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def ran_out(error: BaseException) -> bool:
    """Return whether the error, or what it was raised from, is that memory ran out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if isinstance(cause, RuntimeError | OSError | ImportError | SystemError) and _SAID.search(str(cause)):
            return True
        cause = _before(cause)
    return False


# The number of the setting and the size from which an allocation is a mapping of its own. Source: malloc.h of glibc, mallopt(3).
_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 20


def return_large_buffers() -> None:
    """From now on what is freed of at least a megabyte goes back to the system at once, where its C library can do that.

    glibc would keep up to 32 MB of what was freed for each size that it met, and as much again for each thread.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """What was freed goes back to the system, where its C library can do that."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
