"""The rounds of a measurement: which artifact decodes when, and what came of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.conversion.records import size
from benchmarks.conversion.shapes import SHAPES
from benchmarks.decoding.artifacts import Entry
from benchmarks.decoding.profile import nodes_per_step
from benchmarks.decoding.tables import Artifact, Measured, Run, first_difference
from benchmarks.decoding.worker import Failed, Worker
from calque.bandwidth import bandwidth
from calque.bench import prompt, rotated

PROMPTS = (128, 512)
STEPS, WARM_UP_STEPS = 64, 4
# Resident bytes of a process for each byte of its artifact, and what part of the memory all of them may fill.
RESIDENT, SHARE = 1.6, 0.8


@dataclass(frozen=True)
class Made:
    """An entry whose artifact lies in the folder."""

    entry: Entry
    folder: Path


@dataclass(frozen=True)
class Answer:
    """What a worker answered in one run, and the bytes per second at which memory was read just before."""

    artifact: str
    round: int
    prompt: int
    measured: dict[str, Any]
    bandwidth: float


@dataclass
class Crew:
    """The workers of a shape: all of them alive where they fit into memory ``together``, else one, started for its turn."""

    made: Mapping[str, Made]
    shape: str
    threads: int
    together: bool
    stack: ExitStack
    alive: dict[str, Worker] = field(default_factory=dict)

    @contextmanager
    def worker(self, name: str) -> Iterator[Worker]:
        """Give a worker that has decoded every prompt once."""
        with ExitStack() as turn:
            if name not in self.alive:
                started = (self.stack if self.together else turn).enter_context(self._start(self.made[name]))
                for length in PROMPTS:
                    started.decode(prompt(length, SHAPES[self.shape].vocabulary), WARM_UP_STEPS)
                if self.together:
                    self.alive[name] = started
            yield self.alive[name] if self.together else started

    def _start(self, made: Made) -> Worker:
        entry, log = made.entry, made.folder.with_name(f"{made.folder.name}.worker.log")
        return Worker(entry.python, entry.engine, made.folder, self.shape, self.threads, entry.settings, log)


def measure(made: Mapping[str, Made], shape: str, rounds: int, threads: int) -> Measured:
    """Return what the artifacts of one shape took; those that failed say how, and have no figures."""
    sizes = {name: size(one.folder) for name, one in made.items()}
    nodes = {name: nodes_per_step(one.folder, shape) if one.entry.runs_graph else None for name, one in made.items()}
    together = fits(sum(sizes.values()))
    with ExitStack() as stack:
        answers, failed = play(Crew(made, shape, threads, together, stack), rounds)
    done = [name for name in made if name not in failed]
    artifacts = (Artifact(name, nodes[name], sizes[name], peak_rss(answers, name)) for name in done)
    return Measured(tuple(artifacts), runs(answers, done), together, failed)


def peak_rss(answers: Sequence[Answer], name: str) -> int:
    """Return the most resident bytes that a process of the artifact had."""
    return max(answer.measured["peak_rss_bytes"] for answer in answers if answer.artifact == name)


def play(crew: Crew, rounds: int) -> tuple[list[Answer], dict[str, str]]:
    """Return every answer, in order, and what those said that failed."""
    answers: list[Answer] = []
    failed: dict[str, str] = {}
    prompts = {length: prompt(length, SHAPES[crew.shape].vocabulary) for length in PROMPTS}
    for number in range(rounds + 1):
        for name, lengths in turns(list(crew.made), crew.together, number):
            if name in failed:
                continue
            try:
                with crew.worker(name) as worker:
                    # Round 0 only starts what stays alive.
                    for length in lengths if number else ():
                        rate = bandwidth()
                        answers.append(Answer(name, number, length, worker.decode(prompts[length], STEPS), rate))
                        tell(crew.shape, answers[-1])
            except Failed as error:
                failed[name] = str(error)
                print(f"{crew.shape}, {name}: {error}", file=sys.stderr, flush=True)
    return answers, failed


def turns(names: Sequence[str], together: bool, number: int) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield who decodes which prompts in a round, beginning with another one each time.

    Where all are alive, a prompt goes round all of them before the next one; else each is started once in a round.
    """
    if not together and number == 0:
        return  # nobody stays alive
    order = rotated(names, number)
    for lengths in [(length,) for length in PROMPTS] if together and number else [PROMPTS]:
        for name in order:
            yield name, lengths


def fits(artifacts_bytes: int) -> bool:
    """Return whether processes that hold these artifacts fit into this machine's memory together."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return RESIDENT * artifacts_bytes < SHARE * memory


def runs(answers: Sequence[Answer], names: Sequence[str]) -> tuple[Run, ...]:
    """Return the runs of the named artifacts; their tokens are compared with those of the first one."""
    kept = [answer for answer in answers if answer.artifact in names]
    expected = {answer.prompt: answer.measured["tokens"] for answer in kept if answer.artifact == names[0]}
    found = []
    for answer in kept:
        taken = answer.measured
        differs = first_difference(taken["tokens"], expected[answer.prompt])
        speed = STEPS / taken["rest_s"]
        found.append(Run(answer.artifact, answer.round, answer.prompt, taken["first_s"], speed, differs, answer.bandwidth))
    return tuple(found)


def tell(shape: str, answer: Answer) -> None:
    """The run is on standard error."""
    first, rate = 1e3 * answer.measured["first_s"], STEPS / answer.measured["rest_s"]
    print(
        f"{shape} round {answer.round}, prompt of {answer.prompt}, {answer.artifact}: first token after {first:,.0f} ms, "
        f"then {rate:.1f} tokens/s; memory read at {answer.bandwidth / 1e9:.0f} GB/s",
        file=sys.stderr,
        flush=True,
    )
