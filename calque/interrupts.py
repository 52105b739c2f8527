"""Ctrl-C and SIGTERM end the work, also where a library swallows the KeyboardInterrupt that they raise."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_DEFAULTS: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
_received: list[int] = []


@contextlib.contextmanager
def terminations_as_interrupts() -> Iterator[None]:
    """Make SIGTERM and SIGINT raise KeyboardInterrupt while the block runs, and be remembered; handlers of the program's own stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number, default in _DEFAULTS.items() if signal.getsignal(number) == default]
    if len(ours) == len(_DEFAULTS):  # the outermost block: what an earlier one was sent is over
        _received.clear()
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _DEFAULTS[number])


def interrupted() -> bool:
    """Return whether the block that runs, or ran last, was interrupted."""
    return bool(_received)


def raise_if_interrupted() -> None:
    """Leave quietly unless there was an interrupt; a library may have caught it, as some do while they are imported.

    Raises:
        KeyboardInterrupt: there was.
    """
    if _received:
        raise KeyboardInterrupt


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt
