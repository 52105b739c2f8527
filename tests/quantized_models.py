"""A tiny model converted with integer weights, and how it does beside the untouched model with what the integers stand for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx

from calque import passes
from calque.artifact import Artifact
from calque.session import Session
from calque.targets.onnxruntime import OnnxRuntime
from calque.validation import scenarios
from calque.validation.compare import compare
from calque.validation.drive import ModelIO
from calque.validation.eager import with_weights
from calque.validation.reference import store_reference
from tests.tiny_models import VOCABULARY, source_of, traced

# What every proof has and no other scenario makes up for: padding, steps over a cache, a row of its own.
CHOSEN = {"single-prompt", "ragged-left", "ragged-right"}

_KEPT: list[tempfile.TemporaryDirectory[str]] = []


class Quantized:
    """A model as the target writes it."""

    def __init__(self, name: str, precision: str = "int4", target: OnnxRuntime | None = None, **options: Any) -> None:
        self.target = target or OnnxRuntime()
        _KEPT.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        self.folder = Path(_KEPT[-1].name)
        self.name, self.model = name, traced(name)
        plan = passes.with_options(self.target.passes(precision), {f"quantize_weights.{key}": value for key, value in options.items()})
        self.done = passes.run_all(plan, self.model)
        emitted = self.target.emit(self.target.lower(self.model), self.model, self.folder)
        counts = {name: done.count for name, done in self.done.items()}
        self.artifact = Artifact(
            self.folder, "onnxruntime", {}, {}, precision, {}, emitted.graphs, self.model.states, counts, {}, emitted.limits
        )

    @property
    def graph(self) -> onnx.GraphProto:
        """The graph in the file, its weights left out."""
        return onnx.load(self.folder / "model.onnx", load_external_data=False).graph

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        """The nodes of one operator in the file."""
        return [node for node in self.graph.node if node.op_type == operator]

    def faults(self, session: Session | None = None) -> list[str]:
        """What is wrong with each scenario, activations exact, against the limits of float32."""
        model = with_weights(source_of(self.name).load_eager(), self.model.replaced)
        windows = {state.window for state in self.model.states if state.window}
        built = [
            scenario
            for scenario in scenarios.build(self.model.limits, VOCABULARY, excluded=(0, 1, 2), windows=windows)
            if scenario.name in CHOSEN
        ]
        io = ModelIO.of(self.artifact, exact=True)
        (scratch := self.folder / "scratch").mkdir(exist_ok=True)
        references = store_reference(lambda: model, built, io, self.folder, scratch)
        session = session or self.target.exact(self.artifact, 1) or self.target.open(self.artifact, 1)
        rows = [compare(session, io, scenario, references[scenario.name]) for scenario in built]
        assert len(rows) == len(CHOSEN)
        return [f"{row['name']}: {row['reason']}" for row in rows if row["status"] != "passed"]
