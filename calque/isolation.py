"""Calls a function in a process of its own, forked from one that has imported everything: a crash stays its own.

What a conversion imports takes longer than the conversion of a small model; here it is imported once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# Modules without which a conversion is not begun. None starts a thread, which a fork would lose.
PRELOADED = (
    "calque.pipeline",
    "calque.random_weights",
    "calque.converters.causal_lm",
    "calque.targets.onnxruntime",
    "calque.targets._to_onnx",
    "calque.passes.cache_dynamic",
    "calque.validation.prove",
    "calque.runtime.onnxruntime_session",
    "torch.onnx._internal.exporter._core",
    "onnxscript.optimizer",
    "onnxruntime",
)


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code, minus the signal that killed it, None where it was stopped for taking too long."""

    code: int | None
    stdout: str
    stderr: str


def call(function: Callable[[Sequence[str]], int], arguments: Sequence[str], seconds: float) -> Outcome:
    """Return what became of ``function(arguments)``, whose result is its exit code; none of its processes is left behind."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with TemporaryDirectory(prefix="calque-call-") as folder:
        files = Path(folder) / "stdout", Path(folder) / "stderr"
        for file in files:
            file.touch()
        process = context.Process(target=_run, args=(function, list(arguments), *map(str, files)))
        process.start()
        try:
            process.join(seconds)
            late = process.is_alive()
        finally:
            _stop(process)
        code = None if late else process.exitcode
        return Outcome(code, *(file.read_text(encoding="utf-8", errors="replace") for file in files))


def _run(function: Callable[[Sequence[str]], int], arguments: list[str], stdout: str, stderr: str) -> None:
    """Leave the process with the function's exit code; it leads a group of its own and writes to the files."""
    os.setsid()
    for place, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(place, os.O_WRONLY), descriptor)
    sys.exit(function(arguments))


def _stop(process: multiprocessing.process.BaseProcess) -> None:
    """Leave nothing of the process's group alive."""
    if process.is_alive() and process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # it had no time to lead a group yet
        process.join()
