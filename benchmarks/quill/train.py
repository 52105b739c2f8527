"""Training of ``builtin:quill`` in one command: corpus, tokenizer, weights, measurement, published folder.

``python -m benchmarks.quill.train --work DIR --out calque/models/quill`` starts from nothing; called again after an
interruption it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quill.dataset import prepare, windows
from benchmarks.quill.network import Master, fresh, objective
from benchmarks.quill.publish import publish, software
from benchmarks.quill.vocabulary import Tokens

SEED = 20
RATE, WARM_UP, DECAY = 2e-3, 200, 0.3
LONG_RATE, LONG_WARM_UP = 1e-3, 10
SAVE_EVERY, REPORT_EVERY = 200, 20


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one window length."""

    steps: int
    batch: int
    length: int
    attention: str


# Most steps see short windows because attention is the dearest part here; the last ones teach the whole context.
PHASES = (Phase(4000, 16, 256, "eager"), Phase(240, 4, 1024, "sdpa"))
STEPS = sum(phase.steps for phase in PHASES)


def rate_at(step: int) -> float:
    """Return the learning rate: a linear rise, a plateau, a fall with the square root of what is done.

    The long windows begin with a rise of their own: positions not met before cannot be learnt at the end of a fall.
    """
    into_long = step - PHASES[0].steps
    if into_long >= 0:
        return LONG_RATE * min((into_long + 1) / LONG_WARM_UP, 1 - into_long / PHASES[1].steps)
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    begun = STEPS * (1 - DECAY)
    if step < begun:
        return RATE
    return RATE * (1 - math.sqrt((step - begun) / (STEPS - begun)))


class Run:
    """One training run: weights, optimiser and the account of what was done, all of it resumable."""

    def __init__(self, work: Path, compiled: bool) -> None:
        """Start from the checkpoint in the work folder, or from random weights where there is none."""
        self.path = work / "checkpoint.pt"
        self.master = Master(fresh(SEED))
        self.optimiser = self.master.optimiser(RATE)
        self.loss = objective(self.master.network, compiled)
        self.done, self.seconds, self.tokens = 0, 0.0, 0
        self.curve: list[tuple[int, float]] = []
        if self.path.exists():
            stored = torch.load(self.path, weights_only=True)
            self.master.restore(stored["weights"])
            self.optimiser.load_state_dict(stored["optimiser"])
            self.done, self.seconds, self.tokens = stored["done"], stored["seconds"], stored["tokens"]
            self.curve = [(int(step), float(value)) for step, value in stored["curve"]]

    def save(self) -> None:
        """Replace the checkpoint and the record beside it by the present state."""
        stored = {"weights": self.master.state(), "optimiser": self.optimiser.state_dict(), "curve": self.curve}
        counts = {"done": self.done, "seconds": self.seconds, "tokens": self.tokens}
        torch.save(stored | counts, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)
        self.path.with_name("record.json").write_text(json.dumps(self.record(), indent=2), encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """Return what is worth publishing about the training so far."""
        return {
            "seed": SEED,
            "steps": self.done,
            "steps_planned": STEPS,
            "phases": [asdict(phase) for phase in PHASES],
            "learning_rate": {
                "peak": RATE,
                "warm_up_steps": WARM_UP,
                "decay_share": DECAY,
                "long_peak": LONG_RATE,
                "long_warm_up_steps": LONG_WARM_UP,
            },
            "tokens_seen": self.tokens,
            "wall_seconds": round(self.seconds),
            "final_loss": round(sum(value for _, value in self.curve[-5:]) / max(len(self.curve[-5:]), 1), 4),
            "loss_curve": [(step, round(value, 3)) for step, value in self.curve[4::10]],
            "software": software(),
        }

    def finish(self, documents: Sequence[Tokens]) -> None:
        """Take every step that is still to do, with reports and checkpoints on the way."""
        first = 0
        for number, phase in enumerate(PHASES):
            last = first + phase.steps
            if self.done < last:
                self.master.network.set_attn_implementation(phase.attention)
                source = windows(documents, phase.batch, phase.length, SEED + number)
                for _ in range(self.done - first):
                    next(source)
                self._advance(source, phase, last)
            first = last

    def _advance(self, source: Iterator[torch.Tensor], phase: Phase, last: int) -> None:
        recent: list[float] = []
        began = time.monotonic()
        while self.done < last:
            for group in self.optimiser.param_groups:
                group["lr"] = rate_at(self.done)
            loss = self.loss(next(source))
            torch.autograd.backward(loss)
            norm = self.master.step(self.optimiser)
            recent.append(loss.item())
            self.done += 1
            self.tokens += phase.batch * phase.length
            if self.done % REPORT_EVERY == 0 or self.done == last:
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                self.curve.append((self.done, sum(recent) / len(recent)))
                print(
                    f"step {self.done}/{STEPS} loss {self.curve[-1][1]:.4f} norm {norm:.2f} "
                    f"rate {rate_at(self.done - 1):.2e} tokens {self.tokens} seconds {self.seconds:.0f}",
                    flush=True,
                )
                recent = []
            if self.done % SAVE_EVERY == 0 or self.done == last:
                self.save()


def main() -> None:
    """Train to the end and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, corpus and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder the finished model is written to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="train without a C++ compiler, at half the speed")
    given = parser.parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", str(given.threads))
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    data = prepare(given.work)
    print(json.dumps(data.corpus.figures() | {"train_tokens": sum(map(len, data.train))}), flush=True)
    run = Run(given.work, compiled=not given.no_compile)
    run.finish(data.train)
    publish(run.master.state(), data, run.record(), given.out)


if __name__ == "__main__":
    main()
