"""Runs the command `calque convert` many times, each in a process of its own, without importing torch each time.

One process imports and converts once, then forks for every conversion asked of it; the fork plants its fault and calls the
command's own `main`. Run as a module it is that process: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
# A conversion that hangs is ended by the system: exit code -14, SIGALRM.
LONGEST_SECONDS = 120


@dataclass(frozen=True)
class Job:
    """One conversion: the arguments after `convert`, and the fault, if any, that strikes as ``stage`` begins."""

    arguments: tuple[str, ...]
    out: Path
    model: Path = Path("/nonexistent")
    fault: str = ""
    stage: str = ""
    amount: float = 0
    disagree: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a conversion ended: exit code (negative: the signal that ended it) and what it said, progress left out."""

    code: int
    output: str
    errors: str
    stages: tuple[str, ...]

    @property
    def first_line(self) -> str:
        """What standard error says first, besides the progress."""
        return next(iter(self.errors.splitlines()), "")


class Workshop:
    """The process that forks; use it as a context."""

    def __enter__(self) -> Self:
        """Start it; it is ready at its first answer."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.workshop"],
            cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Let it end."""
        self._process.communicate()

    def begin(self, job: Job, folder: Path) -> int:
        """Return the process id of a conversion that now runs; what it says goes to files in ``folder``."""
        answer: dict[str, int] = self._ask({**asdict(job), "folder": str(folder)})
        return answer["pid"]

    def end(self, pid: int, folder: Path) -> Outcome:
        """Return how the conversion ended, once it has."""
        code = self._ask({"wait": pid})["code"]
        errors = (folder / "stderr").read_text().splitlines(keepends=True)
        progress = [line for line in errors if line.startswith("[") and line.rstrip().endswith("…")]
        said = "".join(line for line in errors if line not in progress)
        return Outcome(code, (folder / "stdout").read_text(), said, tuple(line.split("] ")[1].split()[0] for line in progress))

    def run(self, job: Job) -> Outcome:
        """Return how the conversion ended."""
        with tempfile.TemporaryDirectory() as folder:
            return self.end(self.begin(job, Path(folder)), Path(folder))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question, default=str), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the workshop ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _serve() -> None:
    """Answer questions until there are no more."""
    # Answers go to a descriptor of their own: whatever a library prints while it is imported is not one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up()
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                _convert(question)
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


def _warm_up() -> None:
    """Import and trace once everything that a conversion does; forks begin where this ends."""
    from calque.pipeline import convert
    from calque.recipe import Recipe
    from tests.faults import planted  # noqa: F401  # what forks need
    from tests.tiny_models import TYPES, save_random

    with tempfile.TemporaryDirectory() as folder:
        model = save_random(TYPES["llama"], Path(folder, "model"))
        convert(Recipe(model=str(model), target="onnxruntime"), Path(folder, "out"))


def _convert(question: dict[str, Any]) -> None:
    """Run the command in this process and leave it with the command's exit code."""
    folder = Path(question["folder"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # Whatever started the tests may have made them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(LONGEST_SECONDS)
    # A file of core memory beside the tests is of no use to anyone.
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 70
    try:
        code = _command(question)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(question: dict[str, Any]) -> int:
    from calque import cli
    from tests.faults import planted

    scene = planted.Scene(Path(question["out"]), Path(question["model"]), question["amount"])
    if question["disagree"]:
        planted.disagree()
    if question["fault"]:
        planted.plant(question["fault"], question["stage"], scene)
    return cli.main(["convert", *question["arguments"]])


def arguments_for(model: str | Path, out: Path, *more: str) -> tuple[str, ...]:
    """Return the arguments of a conversion of ``model`` to ``out`` that may replace an older artifact."""
    return ("--target", "onnxruntime", str(model), "-o", str(out), "--force", *more)


def names(folder: Path) -> Sequence[str]:
    """Return what lies in the folder, sorted; nothing where it is gone."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


if __name__ == "__main__":
    _serve()
