"""Holds one artifact and decodes when asked: a line of JSON in, a line of JSON out.

``python -m benchmarks.decoding.worker FOLDER SHAPE THREADS``, from the repository root. A process of its own, so that its
memory is that of one artifact.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.conversion.shapes import SHAPES

ROOT = Path(__file__).parents[2]


class Worker:
    """The worker of one artifact, as who asks it sees it; it ends with the block."""

    def __init__(self, folder: Path, shape: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.decoding.worker", str(folder), shape, str(threads)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def decode(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Return what the worker measured: ``first_s``, ``rest_s``, ``tokens`` and its ``peak_rss_bytes`` so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "steps": steps}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(self._process.wait(), self._process.args)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()  # it keeps nothing
        self._process.communicate()


def serve(folder: Path, shape: str, threads: int) -> None:
    """Every line of standard input has its answer."""
    # Here, not above: who asks needs neither, and this process nothing else.
    from benchmarks.decoding.loop import Decoder
    from calque.stages import peak_rss

    decoder = Decoder(folder, SHAPES[shape], threads)
    for line in sys.stdin:
        decoded = decoder.decode(**json.loads(line))
        print(json.dumps({**asdict(decoded), "peak_rss_bytes": peak_rss()}), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
