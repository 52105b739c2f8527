"""Measures a command as a whole tree of processes: wall and processor seconds, and the peak of its resident memory.

Linux alone: memory and processor time are read from /proc every 20 ms while the tree runs.
"""

from __future__ import annotations

import bisect
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """The living tree at one moment: seconds since its start, resident bytes and processor seconds so far."""

    at: float
    rss: int
    cpu: float


@dataclass(frozen=True)
class Measured:
    """One command that ended.

    ``cpu_s`` is user and system time of the process and of every descendant that was waited for. ``others_cpu_s`` is
    what the rest of the machine, and the host's theft, used of the processors meanwhile: how quiet it was.
    ``marked_at`` is when the mark first stood in the log.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    others_cpu_s: float
    marked_at: float | None
    samples: tuple[Sample, ...]

    def cpu_at(self, seconds: float) -> float:
        """Return the processor seconds used up to a moment, from the nearest sample at or before it."""
        index = bisect.bisect_right(self.samples, seconds, key=lambda sample: sample.at)
        return self.samples[index - 1].cpu if index else 0.0


def measure(command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path, mark: str | None = None) -> Measured:
    """Run the command in ``folder`` to its end, its output in ``log``, and return what it took."""
    os.sync()  # nothing of the run before is still to be written
    busy = busy_seconds()
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=folder, start_new_session=True
        )
        sampler = _Sampler(process.pid, start, log, mark)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            sampler.ended.set()
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait again
    sampler.join()
    cpu = usage.ru_utime + usage.ru_stime
    # The kernel's own peak of the largest single process catches what falls between two samples. Between fork and exec a
    # child has this process's pages, which count in its peak ever after: only what lies above ours is the command's.
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = max([usage.ru_maxrss * 1024 if usage.ru_maxrss > ours else 0, *(sample.rss for sample in sampler.samples)])
    others = max(0.0, busy_seconds() - busy - cpu)
    return Measured(process.returncode, wall, cpu, peak, others, sampler.marked_at, tuple(sampler.samples))


def busy_seconds() -> float:
    """Return the processor seconds that the machine was not idle since it started; what the host stole counts as busy."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, interrupt, soft_interrupt, steal = map(int, fields[1:9])
    return (user + nice + system + interrupt + soft_interrupt + steal) / TICK


def tree(root: int) -> Iterator[tuple[int, int | None]]:
    """Yield the process and every living descendant of it, each with its parent."""
    waiting: list[tuple[int, int | None]] = [(root, None)]
    while waiting:
        process, parent = waiting.pop()
        yield process, parent
        try:
            threads = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue  # it has ended
        for thread in threads:
            waiting += ((int(child), process) for child in _read(f"/proc/{process}/task/{thread}/children").split())


def sample(root: int, at: float) -> Sample:
    """Return the living tree as it is now; processor time includes that of children already waited for."""
    rss, ticks = 0, 0
    for process, parent in tree(root):
        # The name in brackets may hold spaces; after it, utime, stime, cutime and cstime are the 12th to 15th, rss the 22nd.
        fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
        if len(fields) > 21:
            ticks += sum(map(int, fields[11:15]))
            rss += 0 if parent and _is_copy(process, parent) else int(fields[21]) * PAGE
    return Sample(at, rss, ticks / TICK)


def _is_copy(process: int, parent: int) -> bool:
    """Return whether the process is between fork and exec: it shows its parent's pages, which must not be counted twice."""
    return _read(f"/proc/{process}/cmdline") == _read(f"/proc/{parent}/cmdline")


class _Sampler(threading.Thread):
    """Samples a tree until ``ended`` is set, and notes when the mark appears in the log."""

    def __init__(self, root: int, start: float, log: Path, mark: str | None) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.samples: list[Sample] = []
        self.marked_at: float | None = None
        self._root, self._start, self._log, self._mark = root, start, log, mark

    def run(self) -> None:
        """Sample every 20 ms."""
        while not self.ended.wait(INTERVAL):
            now = time.perf_counter() - self._start
            taken = sample(self._root, now)
            if taken.rss:
                self.samples.append(taken)
            if self._mark and self.marked_at is None and self._mark in _read(str(self._log)):
                self.marked_at = now


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
