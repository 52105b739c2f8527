"""Packages of tiny models as the Core ML target writes them, without the gate, made once a process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calque import passes
from calque.artifact import Artifact
from calque.runtime.coreml_session import CoreMLSession
from calque.targets import make
from calque.targets.coreml import CoreML
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from tests.tiny_models import traced

pytest.importorskip("coremltools")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Made:
    """A model after its passes, and the artifact that was written of it."""

    model: TracedModel
    artifact: Artifact
    operators: tuple[str, ...]

    @property
    def package(self) -> Path:
        return self.artifact.folder / "model.mlpackage"

    def session(self) -> CoreMLSession:
        return CoreMLSession(self.artifact)

    def worst(self, graph: str, inputs: Arrays) -> float:
        """How far the package is from the graph, in units of the spread of an output."""
        found: Arrays = self.session()(graph, inputs)
        wanted: Arrays = dict(TracedSession(self.model)("model", inputs))
        assert set(found) == set(wanted)
        return max(float(np.abs(found[name].astype(np.float32) - wanted[name]).max() / wanted[name].std()) for name in wanted)


@cache
def made(name: str, precision: str = "fp32", **options: Any) -> Made:
    return write(traced(name), precision, **options)


def write(model: TracedModel, precision: str = "fp32", **options: Any) -> Made:
    """The package is written into a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="coreml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = make("coreml", options)
    assert isinstance(target, CoreML)
    passes.run(target.passes(precision), model)
    assert target.problems(model) == []
    lowered = target.lower(model)
    emitted = target.emit(lowered, model, folder)
    operators = tuple(op.op_type for function in lowered[0].functions.values() for op in function.operations)
    artifact = Artifact(
        folder=folder, target="coreml", recipe={"options": options}, source={}, precision=precision, files={}, graphs=emitted.graphs,
        states=model.states, passes={}, tools={}, limits=emitted.limits,
    )  # fmt: skip
    return Made(model, artifact, operators)


def grown(inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]], made: Made) -> Arrays:
    """The call of one token more, after the one whose inputs and outputs are given."""
    ids = inputs["input_ids"][:, -1:]
    states = {state.input: outputs[state.output] for state in made.model.states}
    mask = np.concatenate([inputs["attention_mask"], np.ones_like(ids)], axis=1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": inputs["position_ids"][:, -1:] + 1, **states}
