"""Seconds and peak memory of each stage of a conversion, measured while it runs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from calque.interrupts import raise_if_interrupted
from calque.memory import trim

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Stage:
    """One stage that ended: wall seconds, and the peak resident bytes of the process tree while it ran."""

    name: str
    seconds: float
    peak_rss_bytes: int


@dataclass
class Stages:
    """Measures stages in order; ``announce`` is told the name of each as it begins."""

    announce: Callable[[str], None]
    done: list[Stage] = field(default_factory=list)
    now: str = "the conversion"

    def doing(self) -> str:
        """Return the name of the stage that runs, or ran last."""
        return self.now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block as the stage ``name``."""
        raise_if_interrupted()
        self.announce(name)
        self.now = name
        trim()  # what the stage before freed is not this one's
        _reset_peak()
        start = time.perf_counter()
        yield
        # No stage starts a process, so the tree is this process.
        self.done.append(Stage(name, time.perf_counter() - start, peak_rss()))


def peak_rss() -> int:
    """Return the peak resident bytes of this process since the last reset; since its start where the system cannot reset."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    """Make the kernel forget the peak, where it can: 5 is its word for that. Source: Linux Documentation/filesystems/proc.rst."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the whole run so far
