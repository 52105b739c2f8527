"""The CPU of this machine: the runtimes that run there are tried and measured, and the artifact is that of the fastest.

::

    candidates    one conversion each, proved by the gate like any other; what cannot be converted is left out, and the report says why
    measured      side by side in rounds, at the recipe's typical batch and length
    the artifact  that of the fastest: its manifest names that target, and it is loaded like any artifact of it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calque.errors import UsageError
from calque.targets import Emitted, Problem, Target, load

if TYPE_CHECKING:
    from calque.artifact import Artifact
    from calque.passes import Pass
    from calque.session import Session
    from calque.traced import TracedModel

Candidate = Literal["onnxruntime", "aotinductor", "torchscript"]


@dataclass(frozen=True)
class Cpu:
    """``candidates``: what is tried; of equal ones the first is taken.

    ``judged_by``: what of a generator has to be fast: an ``answer`` of ``new_tokens`` after a prompt of typical length, the
    ``prompt`` alone, or each ``step`` after it; of an encoder it is a call. ``rounds``: how often each is measured.
    """

    candidates: tuple[Candidate, ...] = ("onnxruntime", "aotinductor", "torchscript")
    judged_by: Literal["answer", "prompt", "step"] = "answer"
    new_tokens: int = 64
    rounds: int = 3

    name: ClassVar[str] = "cpu"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16", "int8", "int8-static", "int4")

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise ValueError(f"candidates: must name each runtime once, at least one; found {list(self.candidates)}")
        if self.new_tokens < 2 or self.rounds < 1:
            raise ValueError("new_tokens: must be at least 2, and rounds at least 1")

    def candidates_of(self, precision: str) -> tuple[str, ...]:
        """Return the candidates that have the precision.

        Raises:
            UsageError: none has.
        """
        having = tuple(name for name in self.candidates if precision in load(name).precisions)
        if not having:
            lines = [f"{name}  {', '.join(load(name).precisions)}" for name in self.candidates]
            raise UsageError(f"no candidate has the precision {precision}", lines, "name another precision, or more candidates")
        return having

    def cost(self, figures: Mapping[str, Any], new_tokens: int) -> float:
        """Return the milliseconds that are compared, of what `calque bench` says of one artifact at one length."""
        if "call_ms" in figures:
            return float(figures["call_ms"]["p50"])
        # Of the best round: what else a machine does only ever adds.
        first, step = figures["ttft_ms"]["min"], figures["tpot_ms"]["min"]
        return float({"answer": first + (new_tokens - 1) * step, "prompt": first, "step": step}[self.judged_by])

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return what the first candidate cannot express."""
        return self._first().problems(model)

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of the first candidate that has the precision."""
        return load(self.candidates_of(precision)[0])().passes(precision)

    def lower(self, model: TracedModel) -> Any:
        """Return the model as the first candidate represents it."""
        return self._first().lower(model)

    def emit(self, lowered: Any, model: TracedModel, folder: Path) -> Emitted:
        """Write the files of the first candidate."""
        return self._first().emit(lowered, model, folder)

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of the target that was picked."""
        return load(artifact.target)(**artifact.recipe.get("options", {})).open(artifact, threads)

    def _first(self) -> Target:
        return load(self.candidates[0])()

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return what every candidate needs."""
        rows = [row for name in self.candidates for row in load(name)().doctor()]
        return list(dict.fromkeys(rows))


TARGET = Cpu
