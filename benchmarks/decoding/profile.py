"""Prints how many nodes ONNX Runtime executes for one token.

``python -m benchmarks.decoding.profile FOLDER SHAPE``, from the repository root. A process of its own: profiling slows a session.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.conversion.shapes import SHAPES

ROOT = Path(__file__).parents[2]
KERNEL = "_kernel_time"


def nodes_per_step(folder: Path, shape: str) -> int:
    """Return how many nodes one step of decoding executes, counted in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.decoding.profile", str(folder), shape]
    return int(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def nodes_of_last_run(events: Sequence[dict[str, Any]]) -> int:
    """Return how many nodes the last run in a profile executed; those of subgraphs count, as they take time too."""
    run = max((event for event in events if event["name"] == "model_run"), key=lambda event: int(event["ts"]))
    start, end = run["ts"], run["ts"] + run["dur"]
    return sum(event["cat"] == "Node" and event["name"].endswith(KERNEL) and start <= event["ts"] <= end for event in events)


def count(folder: Path, shape: str) -> int:
    """Return the nodes of one step after a short prompt."""
    from benchmarks.decoding.engines.onnx_runtime import Engine
    from benchmarks.decoding.loop import decode

    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(folder, SHAPES[shape], threads=1, profile=Path(scratch) / "profile")
        decode(engine, [1, 2, 3, 4], 1)
        return nodes_of_last_run(json.loads(Path(engine.session.end_profiling()).read_text(encoding="utf-8")))


if __name__ == "__main__":
    print(count(Path(sys.argv[1]), sys.argv[2]))
