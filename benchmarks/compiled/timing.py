"""Runs one artifact and the eager model it came of in turn and says how long each took, as a line of JSON.

``python -m benchmarks.compiled.timing FOLDER MODEL TASK RANDOM THREADS``, from the repository root; MODEL and RANDOM as
`calque convert` is given them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from calque.artifact import PIXELS, Artifact
from calque.runtime import Decoder, open_session
from calque.source import ModelSource

PROMPT, STEPS, ROUNDS, CALLS = 64, 16, 5, 8
# An interpreter of numpy is no runtime: one round says enough.
SLOW_S = 2.0


def timed(work: Callable[[], object]) -> float:
    """Return the milliseconds that it took."""
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


class Decoding:
    """A generator: a prompt of 64 tokens, then 16 steps of one, as an artifact or as the eager model."""

    def __init__(self, artifact: Artifact, threads: int, eager: Any) -> None:
        self.eager, self.ids = eager, np.random.default_rng(5).integers(3, 64, (1, PROMPT + STEPS))
        self.load_ms = timed(lambda: self._open(artifact, threads))

    def _open(self, artifact: Artifact, threads: int) -> None:
        self.decoder = Decoder(artifact, open_session(artifact.folder, threads))
        self.decoder(self.ids[:, :2])

    def artifact_ms(self) -> tuple[float, float]:
        """Return milliseconds of the prompt, and of each step after it."""
        self.decoder.reset()
        prompt, *pieces = np.split(self.ids, range(PROMPT, PROMPT + STEPS), axis=1)
        return timed(partial(self.decoder, prompt)), statistics.median(timed(partial(self.decoder, piece)) for piece in pieces)

    def eager_ms(self) -> tuple[float, float]:
        """Return the same of the eager model with its own cache."""
        from transformers import DynamicCache

        cache, ids = DynamicCache(config=self.eager.config), torch.from_numpy(self.ids)
        with torch.inference_mode():
            prompt, *pieces = ids.split([PROMPT, *[1] * STEPS], dim=1)
            return timed(partial(self._call, prompt, cache)), statistics.median(
                timed(partial(self._call, piece, cache)) for piece in pieces
            )

    def _call(self, ids: torch.Tensor, cache: Any) -> None:
        self.eager(input_ids=ids, past_key_values=cache, use_cache=True)


class Encoding:
    """An encoder: calls with one text of 64 tokens, or one image."""

    def __init__(self, artifact: Artifact, threads: int, eager: Any) -> None:
        self.eager, (self.spec,) = eager, artifact.graphs.values()
        ids = np.random.default_rng(5).integers(5, 64, (1, PROMPT))
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        known |= {one.name: np.zeros((1, *map(int, one.shape[1:])), np.float32) for one in self.spec.inputs if one.name == PIXELS}
        self.feed = {one.name: known[one.name].astype(one.dtype) for one in self.spec.inputs}
        self.load_ms = timed(lambda: self._open(artifact, threads))

    def _open(self, artifact: Artifact, threads: int) -> None:
        self.session, self.graph = open_session(artifact.folder, threads), next(iter(artifact.graphs))
        self.session(self.graph, self.feed)

    def artifact_ms(self) -> tuple[float, None]:
        """Return milliseconds of a call."""
        return statistics.median(timed(lambda: self.session(self.graph, self.feed)) for _ in range(CALLS)), None

    def eager_ms(self) -> tuple[float, None]:
        """Return the same of the eager model."""
        given = {name: torch.from_numpy(array) for name, array in self.feed.items()}
        with torch.inference_mode():
            return statistics.median(timed(lambda: self.eager(**given)) for _ in range(CALLS)), None


def measure(folder: Path, model: str, task: str, random: bool, threads: int) -> dict[str, Any]:
    """Return load_ms, and the median of the rounds of first_ms and step_ms of both; rounds are interleaved."""
    torch.set_num_threads(threads)
    artifact = Artifact.read(folder)
    with TemporaryDirectory() as scratch:
        eager = ModelSource.resolve(model, task=task, random_weights=random, scratch=Path(scratch)).load_eager()
        subject = (Decoding if artifact.states else Encoding)(artifact, threads, eager)
        subject.eager_ms()
        slow = timed(subject.artifact_ms) > 1e3 * SLOW_S
        rounds = [(subject.artifact_ms(), subject.eager_ms()) for _ in range(1 if slow else ROUNDS)]
    found: dict[str, Any] = {"load_ms": subject.load_ms}
    for place, name in enumerate(("artifact", "eager")):
        for part, what in enumerate(("first_ms", "step_ms")):
            values = [one[place][part] for one in rounds]
            found[f"{name}_{what}"] = None if values[0] is None else statistics.median(values)
    return found


def main() -> None:
    """Measure what the command line names and print it."""
    folder, model, task, random, threads = sys.argv[1:]
    print(json.dumps(measure(Path(folder), model, task, random == "random", int(threads))), flush=True)


if __name__ == "__main__":
    main()
