"""Telling that memory ran out from the many ways in which libraries say so."""

from __future__ import annotations

import errno
import re

# torch, safetensors and the C++ library have no exception type for it.
_SAID = re.compile(r"can(not|'t) allocate memory|not enough memory|out of memory|std::bad_alloc|can't start new thread", re.IGNORECASE)


def ran_out(error: BaseException) -> bool:
    """Return whether the error, or what it was raised from, is that memory ran out."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if isinstance(cause, RuntimeError | OSError | ImportError | SystemError) and _SAID.search(str(cause)):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False
