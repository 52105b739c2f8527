"""Greedy decoding, the same for every runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


class Engine(Protocol):
    """One artifact in its runtime, with the cache of one sequence that is not padded.

    Made from the artifact's folder, the shape, the number of threads and what else the runtime is told.
    """

    def restart(self) -> None:
        """The cache is empty."""

    def step(self, ids: list[int], total: int) -> int:
        """Return the most probable token after the ids, which are in the cache now; ``total`` counts them and all before."""


@dataclass(frozen=True)
class Decoded:
    """Seconds to the first token, seconds of all later steps together, and every token."""

    first_s: float
    rest_s: float
    tokens: list[int]


def decode(engine: Engine, prompt: list[int], steps: int) -> Decoded:
    """Return what greedy decoding gives: the prompt in one run, then as many runs of one token as there are steps."""
    start = time.perf_counter()
    engine.restart()
    tokens = [engine.step(prompt, len(prompt))]
    first = time.perf_counter()
    for step in range(1, steps + 1):
        tokens.append(engine.step(tokens[-1:], len(prompt) + step))
    return Decoded(first - start, time.perf_counter() - first, tokens)
