"""Holds one artifact and runs it when asked: a line of JSON in, a line of JSON out. ``python -m calque.bench_worker FOLDER THREADS ROWS``.

A process of its own, so that its memory is that of one artifact, and a crash is its own too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from calque.artifact import PIXELS, Artifact, GraphSpec, read_json
from calque.errors import CalqueError, Unsupported
from calque.failures import explained
from calque.runtime import OnnxRuntimeSession, open_session
from calque.runtime.generate import GreedySequence
from calque.runtime.onnx_file import OnnxFile
from calque.session import Session
from calque.stages import peak_rss


class Generator:
    """An artifact that continues tokens."""

    kind = "generator"

    def __init__(self, artifact: Artifact, session: Session, rows: int) -> None:
        self.sequence = GreedySequence(artifact, session, [0], rows)
        self.sequence.warm_up()

    def run(self, prompt: list[int], new: int) -> list[float]:
        """Return the seconds to the first of ``new`` tokens, and of each step after it."""
        self.sequence.restart(prompt)
        seconds = []
        start = time.perf_counter()
        for _ in self.sequence.tokens(new):
            now = time.perf_counter()
            seconds.append(now - start)
            start = now
        return seconds


class Encoder:
    """An artifact that encodes so many texts a call, or looks at so many images."""

    kind = "encoder"

    def __init__(self, artifact: Artifact, session: Session, rows: int) -> None:
        if len(artifact.graphs) != 1:
            raise Unsupported(f"one graph is measured, {artifact.folder} has {sorted(artifact.graphs)}")
        [(self.graph, self.spec)] = artifact.graphs.items()
        self.session, self.rows = session, rows
        self.run([0], 1)

    def run(self, prompt: list[int], new: int) -> list[float]:
        """Return the seconds of each call, ``new`` of them; images are as large as the model has them, whatever the prompt."""
        known = {
            "input_ids": np.array([prompt] * self.rows, np.int64),
            "attention_mask": np.ones((self.rows, len(prompt)), np.int64),
            "token_type_ids": np.zeros((self.rows, len(prompt)), np.int64),
            "position_ids": np.tile(np.arange(len(prompt), dtype=np.int64), (self.rows, 1)),
        }
        images = [spec for spec in self.spec.inputs if spec.name == PIXELS and all(isinstance(size, int) for size in spec.shape[1:])]
        known |= {spec.name: np.zeros((self.rows, *map(int, spec.shape[1:])), spec.dtype) for spec in images}
        if other := [tensor.name for tensor in self.spec.inputs if tensor.name not in known]:
            raise Unsupported(f"nobody knows here what to feed {self.spec.file}", other, "measure encoders of text, or of images")
        feed = {tensor.name: known[tensor.name] for tensor in self.spec.inputs}
        seconds = []
        for _ in range(new):
            start = time.perf_counter()
            self.session(self.graph, feed)
            seconds.append(time.perf_counter() - start)
        return seconds


def vocabulary(artifact: Artifact, spec: GraphSpec) -> int:
    """Return a number below which every token id is one of the model's."""
    sizes = [tensor.shape[-1] for tensor in spec.outputs if tensor.name == "logits" and artifact.states]
    sizes.append(read_json(artifact.folder / "config.json").get("vocab_size", 1))
    return next((size for size in sizes if isinstance(size, int)), 1)


def serve(folder: Path, threads: int, rows: int) -> None:
    """What the artifact is has been said, then every line of standard input answered."""
    session = open_session(folder, threads)
    artifact = Artifact.read(folder)
    runner: Generator | Encoder = (Generator if artifact.states else Encoder)(artifact, session, rows)
    spec = next(iter(artifact.graphs.values()))
    onnx = isinstance(session, OnnxRuntimeSession) and spec.file.endswith(".onnx")
    _say(
        kind=runner.kind,
        target=artifact.target,
        precision=artifact.precision,
        max_length=artifact.limits.max_length,
        vocabulary=vocabulary(artifact, spec),
        bytes_per_call=OnnxFile.read(folder / spec.file).bytes_per_call() if onnx else None,
    )
    for line in sys.stdin:
        asked = json.loads(line)
        _say(seconds=runner.run(asked["prompt"], asked["new"]), peak_rss_bytes=peak_rss())


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> int:
    """Serve; what fails is said as an object with ``error``."""
    try:
        serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except BrokenPipeError:  # nobody asks any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
    except Exception as error:  # whatever it is, who asks reports it
        known = explained(error, "bench") or CalqueError(f"{type(error).__name__}: {' '.join(str(error).split())}")
        _say(error={"type": type(known).__name__, "what": known.what, "where": list(known.where), "fix": known.fix})
        return known.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
