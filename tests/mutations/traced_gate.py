"""A tiny model traced once, its scenarios and its references: what a mutation is held against."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calque import passes
from calque.artifact import Limits
from calque.converters import causal_lm
from calque.passes.cache_dynamic import CacheDynamic
from calque.runtime.limits import check_limits
from calque.session import Session
from calque.source import ModelSource
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from calque.validation import scenarios
from calque.validation.compare import Row, compare
from calque.validation.drive import ModelIO
from calque.validation.reference import Reference, store_reference
from calque.validation.scenarios import Scenario
from tests.tiny_models import TINY, TYPES, VOCABULARY, config_of

if TYPE_CHECKING:
    from calque.session import Arrays

# One of each way to say a position, to share keys between heads, to limit what a query sees, and to mix experts.
MODELS = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mixtral")
# What a quick run goes through: one that is plain, one with windows and caps, one with positions that are learned. `-m slow`: the others.
QUICK = ("llama", "llama-16", "gemma2", "gpt2")
# Set so that a fault shows. Every model is tied, so that there is a tie to lose. Gemma's query scale is not that of its head
# size, and its soft caps are as near to the scores of a tiny model as 50 and 30 are to those of a trained one. Its embeddings
# times √hidden have unit variance, so that an epsilon of 1e-6 or of 1e-5 is all one to float32 (3e-5 to 4e-5 σ): hence 1e-4.
CHANGED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 10.0, "final_logit_softcapping": 6.0, "rms_norm_eps": 1e-4},
    "gemma3_text": {"query_pre_attn_scalar": 16, "rms_norm_eps": 1e-4},
}
# Half of a head of 16 is what the kernel that rotates by itself can turn.
SHAPES = {**TYPES, **TINY, "llama-16": replace(TYPES["llama"], head_dim=16)}
# The rows of this scenario are the longest that every model has.
LONGEST = "untraced-length"


@dataclass(frozen=True)
class LimitedSession:
    """Refuses what the limits forbid, as the session of every artifact does."""

    session: Session
    limits: Limits

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        check_limits(self.limits, inputs)
        return self.session(graph, inputs)


@dataclass(frozen=True)
class TracedGate:
    """``traced`` as the converter left it, ``settled`` after the cache pass; neither is ever changed."""

    name: str
    source: ModelSource
    traced: TracedModel
    settled: TracedModel
    scenarios: Sequence[Scenario]
    references: dict[str, dict[str, Reference]]
    folder: Path

    @property
    def io(self) -> ModelIO:
        return io_of(self.settled)

    def session(self, model: TracedModel) -> LimitedSession:
        return LimitedSession(TracedSession(model), model.limits)

    def first_failure(self, session: Session) -> Row | None:
        """The row of the first scenario that fails, None if all pass."""
        rows = (compare(session, self.io, scenario, self.references[scenario.name]) for scenario in self.scenarios)
        return next((row for row in rows if row["status"] == "failed"), None)

    def one_forward(self, session: Session) -> Row:
        """What an exporter's usual check sees: one forward of one unpadded prompt over an empty cache."""
        longest = next(scenario for scenario in self.scenarios if scenario.name == LONGEST)
        rows = tuple(row[:prompt] for row, prompt in zip(longest.rows, longest.prompts, strict=True))
        return compare(session, self.io, replace(longest, rows=rows, decode=0), self.references[LONGEST])


def some_quick(*names: str) -> list[Any]:
    """The models as parameters of a test, those that are not quick marked as slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def io_of(settled: TracedModel) -> ModelIO:
    return ModelIO("model", settled.inputs, settled.outputs[:1], settled.states)


@cache
def traced_gate(name: str) -> TracedGate:
    """The gate of a model, made once a process: tracing is what costs."""
    _KEPT.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    folder = Path(_KEPT[-1].name)
    (folder / "scratch").mkdir()
    tiny = SHAPES[name]
    config_of(replace(tiny, extra={**tiny.extra, "tie_word_embeddings": True, **CHANGED.get(name, {})})).save_pretrained(folder)
    source = ModelSource.resolve(str(folder), random_weights=True, scratch=folder / "scratch")
    traced = causal_lm.trace(source)
    settled = traced.copy()
    passes.run([CacheDynamic()], settled)
    windows = {state.window for state in traced.states if state.window}
    built = scenarios.build(traced.limits, VOCABULARY, excluded=(0, 1, 2), windows=windows)
    references = store_reference(source.load_eager, built, io_of(settled), folder, folder / "scratch")
    return TracedGate(name, source, traced, settled, built, references, folder)
