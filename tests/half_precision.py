"""A tiny model converted in a precision, with its scenarios and the references that belong to that precision."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from calque import passes
from calque.artifact import Artifact
from calque.choices import NARROW
from calque.runtime.limits import check_limits
from calque.session import Session
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from calque.validation import scenarios
from calque.validation.compare import Row, compare
from calque.validation.drive import ModelIO
from calque.validation.eager import narrowed
from calque.validation.reference import Reference, store_reference
from calque.validation.scenarios import Scenario
from calque.weights import Derived
from tests.tiny_models import VOCABULARY, source_of, traced

# What a llama adds up in its stream: all of it times a number is the same model, for each norm divides by it.
ADDED = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")

_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Half:
    """``model``: the graph as it was written to the artifact; never changed."""

    model: TracedModel
    artifact: Artifact
    scenarios: list[Scenario]
    references: dict[str, dict[str, Reference]]
    target: OnnxRuntime

    def rows(self, session: Session) -> Iterator[Row]:
        """How the session does in each scenario."""
        io = ModelIO.of(self.artifact)
        return (compare(session, io, scenario, self.references[scenario.name]) for scenario in self.scenarios)

    def failed(self, session: Session) -> Row | None:
        """The first row that failed."""
        return next((row for row in self.rows(session) if row["status"] == "failed"), None)

    def graph(self, model: TracedModel) -> Session:
        """A session over a graph in the artifact's place."""
        return TracedSession(model, partial(check_limits, model.limits))


@cache
def half(name: str, precision: str = "fp16", target: OnnxRuntime = OnnxRuntime(), loudness: float = 1.0) -> Half:  # noqa: B008  # frozen
    """The model as the target writes it in that precision, made once a process; its stream so many times as large."""
    _KEPT.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    folder = Path(_KEPT[-1].name)
    (folder / "scratch").mkdir()
    model, source = traced(name), source_of(name)
    loud = [weight for weight in model.weights.entries if weight.endswith(ADDED)] if loudness != 1.0 else []
    for weight in loud:
        entry = model.weights[weight]
        model.weights.entries[weight] = Derived((entry,), "times", lambda tensor: tensor.float() * loudness, "float32", entry.shape)

    def eager() -> torch.nn.Module:
        loaded = source.load_eager()
        for weight in loud:
            loaded.get_parameter(weight).mul_(loudness)
        return narrowed(loaded, NARROW.get(precision))

    counts = passes.run(target.passes(precision), model)
    emitted = target.emit(target.lower(model), model, folder)
    recipe = {"options": {"arithmetic": target.arithmetic}}
    artifact = Artifact(folder, "onnxruntime", recipe, {}, precision, {}, emitted.graphs, model.states, counts, {}, emitted.limits)
    windows = {state.window for state in model.states if state.window}
    built = scenarios.build(model.limits, VOCABULARY, excluded=(0, 1, 2), windows=windows)
    references = store_reference(eager, built, ModelIO.of(artifact), folder, folder / "scratch")
    return Half(model, artifact, built, references, target)
