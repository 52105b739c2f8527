"""Ctrl-C and SIGTERM end the work, also where a library swallows the KeyboardInterrupt that they raise."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
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
    silenced, hook = logging.root.manager.disable, sys.unraisablehook
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _DEFAULTS[number])
        if ours and _received:
            logging.disable(silenced)
            sys.unraisablehook = hook


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
    # What libraries log of the interrupt, and Python of a callback that it struck, is noise beside the line that ends the work.
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = _unless_interrupt
    raise KeyboardInterrupt


def _unless_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
