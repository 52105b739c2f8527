"""Holds one artifact in its runtime and decodes when asked: a line of JSON in, a line of JSON out.

``python -m benchmarks.decoding.worker ENGINE FOLDER SHAPE THREADS SETTINGS``, from the repository root, in the environment
that has the runtime. A process of its own, so that its memory is that of one artifact.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.conversion.records import last_line
from benchmarks.conversion.shapes import SHAPES

ROOT = Path(__file__).parents[2]


class Failed(RuntimeError):
    """A tool or a runtime ended before its time; the message is what it said last, and names no folder of this machine."""


class Worker:
    """The worker of one artifact, as who asks it sees it; it ends with the block. What it says besides is in the log."""

    def __init__(self, python: Path, engine: str, folder: Path, shape: str, threads: int, settings: Mapping[str, str], log: Path) -> None:
        arguments = (engine, str(folder), shape, str(threads), json.dumps(dict(settings)))
        command = [str(python), "-m", "benchmarks.decoding.worker", *arguments]
        self._log, self._hidden = log, {folder.parent: "WORK", ROOT: "ROOT"}
        with log.open("wb") as said:
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)

    def decode(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Return what the worker measured: ``first_s``, ``rest_s``, ``tokens`` and its ``peak_rss_bytes`` so far.

        Raises:
            Failed: the worker has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"prompt": prompt, "steps": steps}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"decoding ended with exit code {self._process.wait()}: `{last_line(self._log, self._hidden)}`")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()  # it keeps nothing
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # it ended with a question unread


def serve(engine: str, folder: Path, shape: str, threads: int, settings: Mapping[str, str]) -> None:
    """Every line of standard input has its answer."""
    # Here, not above: who asks needs neither, and this process nothing of other engines.
    from benchmarks.decoding.loop import decode
    from calque.stages import peak_rss

    made = import_module(f"benchmarks.decoding.engines.{engine}").Engine(folder, SHAPES[shape], threads, **settings)
    for line in sys.stdin:
        decoded = decode(made, **json.loads(line))
        print(json.dumps({**asdict(decoded), "peak_rss_bytes": peak_rss()}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
