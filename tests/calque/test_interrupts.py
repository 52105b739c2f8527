from __future__ import annotations

import logging
import signal
import sys
import weakref

import pytest

from calque.interrupts import interrupted, terminations_as_interrupts


class Held:
    """Something whose end a callback hears of."""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_libraries_are_silent_once_an_interrupt_came_and_speak_again_afterwards(
    sent: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt):
        _library_struck_by(sent)
    assert interrupted()
    assert sys.unraisablehook is hook
    logging.getLogger("library").error("after")
    assert caplog.messages == ["before", "after"]


def test_interrupt_inside_a_callback_is_remembered_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    held = Held()
    watch = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGINT))
    with terminations_as_interrupts():
        del held
        assert watch() is None
        assert interrupted()
    assert capfd.readouterr().err == ""


@terminations_as_interrupts()
def _library_struck_by(sent: signal.Signals) -> None:
    logging.getLogger("library").error("before")
    try:
        signal.raise_signal(sent)
    except KeyboardInterrupt:
        logging.getLogger("library").error("what it makes of the interrupt")
        raise
