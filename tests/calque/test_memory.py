"""However a library says that memory ran out, it is known; what else goes wrong is not taken for it."""

from __future__ import annotations

import errno

import pytest

from calque.memory import asked_for, ran_out


def raised_from(error: Exception) -> Exception:
    outer = ValueError("cannot be traced")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
        RuntimeError("can't start new thread"),
        SystemError("error return without exception set"),
        SystemError("<built-in function f> returned NULL without setting an exception"),
        raised_from(MemoryError()),
    ],
    ids=repr,
)
def test_memory_that_ran_out_is_known(error: Exception) -> None:
    assert ran_out(error)


@pytest.mark.parametrize("error", [ValueError("out of memory"), SystemError("bad argument"), OSError(errno.ENOSPC, "full")], ids=repr)
def test_what_else_went_wrong_is_not_taken_for_it(error: Exception) -> None:
    assert not ran_out(error)


def test_bytes_that_could_not_be_had_are_read_from_what_was_said() -> None:
    assert asked_for(raised_from(RuntimeError("you tried to allocate 4096 bytes"))) == 4096
    assert asked_for(MemoryError()) is None
