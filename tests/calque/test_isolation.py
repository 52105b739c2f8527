"""What is called in a process of its own ends there, however it ends."""

from __future__ import annotations

import os
import signal

import pytest

from calque.isolation import call
from tests.endings import end


@pytest.mark.parametrize(("how", "code"), [("0", 0), ("3", 3), ("killed", -signal.SIGKILL), ("crashed", -signal.SIGABRT), ("raised", 1)])
def test_outcome_says_how_the_process_ended_and_what_it_wrote(how: str, code: int) -> None:
    outcome = call(end, [how], seconds=120)
    assert outcome.code == code
    assert outcome.stdout == f"out of {how}\n"
    assert outcome.stderr.startswith(f"err of {how}\n")
    assert ("raised on purpose" in outcome.stderr) == (how == "raised")


def test_process_that_does_not_end_is_stopped_and_keeps_what_it_wrote() -> None:
    call(end, ["0"], seconds=120)  # what a process needs to begin is there: the seconds are those that it is stuck
    outcome = call(end, ["stuck"], seconds=5)
    assert outcome.code is None
    assert outcome.stdout == "out of stuck\n"


def test_caller_keeps_its_own_output_and_group(capfd: pytest.CaptureFixture[str]) -> None:
    group = os.getpgrp()
    call(end, ["0"], seconds=120)
    assert os.getpgrp() == group
    assert capfd.readouterr().out == ""
