"""Artifacts measured side by side: each in a process of its own, in rounds, so that a slow minute meets all of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import calque
from calque import errors
from calque.bandwidth import bandwidth
from calque.bench_figures import Run, Subject, results
from calque.errors import CalqueError, Unsupported, UsageError

Subjects = TypeVar("Subjects")

# Calls of an encoder in one run: one alone is too short to be told from chance.
CALLS = 10
# How long a worker is given to end by itself, and one that was interrupted, in seconds.
ENDS_S, INTERRUPTED_S = 10.0, 2.0
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Bench:
    """What is measured: ``prompt_tokens`` are lengths, ``new_tokens`` how many follow each, ``threads`` 0 is one a core.

    ``batch_size``: rows of a call, all alike.
    """

    prompt_tokens: tuple[int, ...] = (128, 512)
    new_tokens: int = 64
    rounds: int = 3
    threads: int = 0
    batch_size: int = 1


class Worker:
    """The process of one artifact, as who asks it sees it; it ends with the block."""

    def __init__(self, folder: Path, threads: int, rows: int = 1) -> None:
        self.folder = folder
        command = [sys.executable, "-P", "-m", "calque.bench_worker", str(folder), str(threads), str(rows)]
        path = os.pathsep.join(filter(None, (str(Path(calque.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path}
        # A session of its own: Ctrl-C comes to who asks alone, who ends this process. If that is killed, this one reads no more, and ends.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def answer(self) -> dict[str, Any]:
        """Return the next line that the process says.

        Raises:
            CalqueError: what the process failed with, of the class it had there; or that it is gone.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        answer: dict[str, Any] = json.loads(line)
        if error := answer.get("error"):
            raise _raised(error)
        return answer

    def run(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """Return ``seconds`` of each step and ``peak_rss_bytes`` so far."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._gone() from error
        return self.answer()

    def _gone(self) -> CalqueError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return CalqueError(f"the process that measured {self.folder} {how}", fix="if memory ran out, measure fewer folders at once")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # It ends by itself where nobody asks any more, and takes with it what its runtime unpacked; interrupted, it is not waited for.
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=ENDS_S if error is None or isinstance(error, Exception) else INTERRUPTED_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()


def _raised(error: Mapping[str, Any]) -> CalqueError:
    kind = getattr(errors, error["type"], CalqueError)
    raised: CalqueError = kind(error["what"], error["where"], error["fix"])
    return raised


def bench(folders: Sequence[Path], asked: Bench, announce: Callable[[str], object] = lambda stage: None) -> dict[str, Any]:
    """Return what was measured, as ``calque bench --json`` prints it; ``announce`` is told what begins.

    Raises:
        UsageError: generators and encoders together.
        Unsupported: a length that one of the artifacts does not take.
        ArtifactUnreadable: a folder that is no artifact, or whose model is broken.
    """
    with ExitStack() as stack:
        announce("open")
        workers = [stack.enter_context(Worker(folder, asked.threads, asked.batch_size)) for folder in folders]
        facts = _introduced(workers)
        subjects = [Subject(str(folder), **fact) for folder, fact in zip(folders, facts, strict=True)]
        _require_lengths(subjects, asked)
        # Of the same tokens for all: each of them is in every vocabulary.
        vocabulary = min(subject.vocabulary for subject in subjects)
        prompts = [prompt(length, vocabulary) for length in dict.fromkeys(asked.prompt_tokens)]
        new = asked.new_tokens if subjects[0].kind == "generator" else CALLS
        announce("warm up")
        for worker in workers:
            for tokens in prompts:
                worker.run(tokens, min(new, WARM_UP_STEPS))
        runs, peaks, rates = [], [0] * len(workers), [bandwidth(asked.threads)]
        for number in range(asked.rounds):
            announce(f"round {number + 1} of {asked.rounds}")
            for tokens in prompts:
                for place in rotated(range(len(workers)), number):
                    answer = workers[place].run(tokens, new)
                    peaks[place] = answer["peak_rss_bytes"]
                    runs.append(Run(place, number, len(tokens), tuple(answer["seconds"])))
            rates.append(bandwidth(asked.threads))
    return results(
        subjects, runs, peaks, rates, {key: getattr(asked, key) for key in ("threads", "rounds", "batch_size")} | {"new_tokens": new}
    )


def _introduced(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """Return what every artifact is; what cannot be opened is reported at once, before anything is measured."""
    facts, failed = [], []
    for worker in workers:
        try:
            facts.append(worker.answer())
        except CalqueError as error:
            failed.append(error)
    if len(failed) > 1:
        lines = [f"{error.what}{' — ' if error.where else ''}{'; '.join(error.where)}" for error in failed]
        raise type(failed[0])(f"{len(failed)} of {len(workers)} folders cannot be measured", lines, failed[0].fix)
    if failed:
        raise failed[0]
    return facts


def _require_lengths(subjects: Sequence[Subject], asked: Bench) -> None:
    if len({subject.kind for subject in subjects}) > 1:
        lines = [f"{subject.folder}  {subject.kind}" for subject in subjects]
        raise UsageError("a generator and an encoder have no speed in common", lines, "measure them apart")
    follow = asked.new_tokens - 1 if subjects[0].kind == "generator" else 0  # the last token is never fed
    wrong = [
        f"{subject.folder}  {length} tokens{f' and {follow} after them' if follow else ''}, max_length {subject.max_length}"
        for subject in subjects
        for length in asked.prompt_tokens
        if subject.max_length is not None and length + follow > subject.max_length
    ]
    if wrong:
        raise Unsupported(
            "some prompts are longer than an artifact takes",
            wrong,
            f"name shorter ones with --prompt-tokens{' or fewer with --new-tokens' if follow else ''}",
        )


def prompt(length: int, vocabulary: int) -> list[int]:
    """Return seeded random tokens, the same each time."""
    chosen = random.Random(length)
    return [chosen.randrange(vocabulary) for _ in range(length)]


def rotated(subjects: Sequence[Subjects], number: int) -> list[Subjects]:
    """Return what is measured in its order, beginning with another one in each round."""
    start = number % len(subjects)
    return [*subjects[start:], *subjects[:start]]
