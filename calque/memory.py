"""Telling that memory ran out from the many ways in which libraries say so."""

from __future__ import annotations

import errno
import re

# torch, safetensors and the C++ library have no exception type for it.
_SAID = re.compile(r"can(not|'t) allocate memory|not enough memory|out of memory|std::bad_alloc|can't start new thread", re.IGNORECASE)


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
