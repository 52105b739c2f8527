"""The memory that a conversion may use: kept while it runs, by ending it rather than passing it.

What a conversion needs is predicted before it begins (`preflight`); this is for predictions that were wrong. The resident
memory of the process and of those it started is read many times a second, and the work ends with exit 6 where it is too much.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from calque.console import size
from calque.errors import WontFit
from calque.memory import return_large_buffers

PROCESSES = Path("/proc")
SECONDS = 0.02


class CeilingReached(BaseException):
    """Raised wherever the work is; no library takes it for an error of its own."""


def tree_rss(pid: int | None = None) -> int:
    """Return the resident bytes of a process, this one by default, and of all that it started; 0 where the system does not say."""
    folder = PROCESSES / str(pid or os.getpid())
    try:
        pages = int((folder / "statm").read_text().split()[1])
        children = [child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, ValueError, IndexError):
        return 0  # it ended meanwhile, or this is not Linux
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(tree_rss(int(child)) for child in children)


@dataclass
class _Watch:
    """Watches on a thread of its own on behalf of another."""

    allowed: int
    thread: int
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    reached: int = 0

    def watch(self) -> None:
        """Raise CeilingReached in the watched thread once, when the memory is more than allowed."""
        while not self.over.wait(SECONDS):
            taken = tree_rss()
            if taken > self.allowed:
                with self.lock:
                    if not self.over.is_set():
                        self.reached = taken
                        _raise_in(self.thread, CeilingReached)
                return

    def end(self) -> None:
        """Stop watching; what was not raised yet never is."""
        with self.lock:
            self.over.set()
            if self.reached:
                _raise_in(self.thread, None)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


@contextmanager
def under(allowed: int | None, doing: Callable[[], str]) -> Iterator[None]:
    """Keep the process and those it starts within ``allowed`` bytes while the block runs; None: whatever it takes.

    ``doing``: what is being done, for the error.

    Raises:
        WontFit: they took more.
    """
    if allowed is None:
        yield
        return
    return_large_buffers()
    watch = _Watch(allowed, threading.get_ident())
    watching = threading.Thread(target=watch.watch, daemon=True)
    watching.start()
    try:
        try:
            yield
        finally:
            watch.end()
            watching.join()
    except CeilingReached:
        raise exceeded(watch, doing()) from None
    if watch.reached:
        raise exceeded(watch, doing())


def exceeded(watch: _Watch, stage: str) -> WontFit:
    """Return the error of a stage that took too much."""
    return WontFit(
        f"{stage} took {size(watch.reached)} of memory, {size(watch.allowed)} are allowed",
        fix=f"allow more with --max-memory, at least {size(round(watch.reached * 1.15))}; the prediction was too low, please report it",
    )
