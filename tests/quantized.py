"""A tiny model converted to integers, with its scenarios and the references that belong to these integers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calque import passes
from calque.artifact import Artifact
from calque.passes.quantize_weights import QuantizeWeights
from calque.runtime.limits import check_limits
from calque.session import Session
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from calque.validation import scenarios
from calque.validation.compare import Row, compare
from calque.validation.drive import ModelIO
from calque.validation.eager import with_weights
from calque.validation.reference import Reference, store_reference
from calque.validation.scenarios import Scenario
from tests.tiny_models import VOCABULARY, source_of, traced

_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Integers:
    """``model``: the graph as it was written to the artifact; ``plain``: as it was before integers were packed. Never changed."""

    plain: TracedModel
    model: TracedModel
    artifact: Artifact
    scenarios: list[Scenario]
    references: dict[str, dict[str, Reference]]
    target: OnnxRuntime

    def failed(self, session: Session, exact: bool = True) -> Row | None:
        """The row of the first scenario that fails."""
        io = ModelIO.of(self.artifact, exact)
        rows = (compare(session, io, scenario, self.references[scenario.name]) for scenario in self.scenarios)
        return next((row for row in rows if row["status"] == "failed"), None)

    def graph(self, model: TracedModel) -> Session:
        """A session over a graph in the artifact's place."""
        return TracedSession(model, partial(check_limits, model.limits))


def planned(target: OnnxRuntime, precision: str, options: dict[str, Any]) -> list[passes.Pass]:
    """The target's passes, integers made as the options say."""
    return [replace(rewrite, **options) if isinstance(rewrite, QuantizeWeights) else rewrite for rewrite in target.passes(precision)]


@cache
def integers(name: str, precision: str = "int4", group: int = 16, symmetric: bool = True, padding: str = "any") -> Integers:
    """The model as ONNX Runtime's target writes it in that precision, made once a process; several groups a row."""
    return _converted(name, precision, padding, {"group": group, "symmetric": symmetric}, ())


@cache
def calibrated(name: str, method: str) -> Integers:
    """The model at 4 bits, rounded by what its products read of a few rows of random tokens."""
    generator = np.random.default_rng(5)
    samples = tuple(tuple(int(token) for token in generator.integers(3, VOCABULARY, 24)) for _ in range(6))
    return _converted(name, "int4", "any", {"group": 16, "method": method}, samples)


def _converted(name: str, precision: str, padding: str, options: dict[str, Any], samples: tuple[tuple[int, ...], ...]) -> Integers:
    _KEPT.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    folder = Path(_KEPT[-1].name)
    (folder / "scratch").mkdir()
    model, source, target = traced(name), source_of(name), OnnxRuntime(padding=padding)  # type: ignore[arg-type]
    model.samples = samples
    plan = planned(target, precision, options)
    at = [passes.name_of(rewrite) for rewrite in plan].index("pack_weights")
    counts = passes.run(plan[:at], model)
    plain = model.copy()
    counts |= {passes.name_of(rewrite): passes.run_one(rewrite, model).count for rewrite in plan[at:]}
    emitted = target.emit(target.lower(model), model, folder)
    artifact = Artifact(folder, "onnxruntime", {}, {}, precision, {}, emitted.graphs, model.states, counts, {}, emitted.limits)
    windows = {state.window for state in model.states if state.window}
    built = scenarios.build(model.limits, VOCABULARY, excluded=(0, 1, 2), windows=windows)

    def eager() -> torch.nn.Module:
        return with_weights(source.load_eager(), model.replaced)

    references = store_reference(eager, built, ModelIO.of(artifact), folder, folder / "scratch", rounding=model.rounding)
    return Integers(plain, model, artifact, built, references, target)
