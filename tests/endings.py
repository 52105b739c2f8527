"""Ways in which a process ends, for tests of what waits for it: importable by name, as a process of its own needs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from calque.cli import main


def end(arguments: Sequence[str]) -> int:
    """Do what the first argument says."""
    how = arguments[0]
    print(f"out of {how}")
    print(f"err of {how}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "crashed":
        os.abort()
    if how == "raised":
        raise RuntimeError("raised on purpose")
    if how == "stuck":
        time.sleep(600)
    return int(how)


def convert_but_crash_on_bert(arguments: Sequence[str]) -> int:
    """Convert, as the command does, except that a type called bert takes its process down."""
    if "/bert/" in arguments[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return main(arguments)
