"""A tiny model, its scenarios and its references, made once a model and run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from calque.artifact import Artifact, Limits
from calque.session import Session
from calque.validation import scenarios
from calque.validation.drive import ModelIO
from calque.validation.reference import Reference, store_reference
from calque.validation.scenarios import Scenario
from tests.eager_session import EagerSession, artifact_of
from tests.tiny_models import TINY, VOCABULARY, eager_model

LIMITS = {"gpt2": Limits(max_length=64), "phi3": Limits(recompute_at=16)}


@dataclass(frozen=True)
class Gate:
    model: PreTrainedModel
    limits: Limits
    artifact: Artifact
    scenarios: list[Scenario]
    references: dict[str, dict[str, Reference]]
    folder: Path

    def session(self) -> EagerSession:
        return EagerSession(self.model, self.limits)

    def pick(self, *names: str) -> list[Scenario]:
        return [scenario for scenario in self.scenarios if scenario.name in names]


# Matrices this small gain nothing from threads, which then wait for each other.
torch.set_num_threads(1)

_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def gate(name: str) -> Gate:
    limits = LIMITS.get(name, Limits())
    model = eager_model(TINY[name])
    _KEPT.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    folder = Path(_KEPT[-1].name)
    artifact = artifact_of(model, limits, folder)
    windows = {state.window for state in artifact.states if state.window}
    found = scenarios.build(limits, VOCABULARY, excluded=(0, 1, 2), windows=windows)
    (folder / "scratch").mkdir()
    references = store_reference(lambda: model, found, ModelIO.of(artifact), folder, folder / "scratch")
    return Gate(model, limits, artifact, found, references, folder)


@dataclass(frozen=True)
class Broken:
    """A session whose inputs, outputs or both are tampered with: ``change(inputs, run)`` stands in for the run."""

    session: Session
    change: Callable[[dict[str, NDArray[np.generic]], Callable[..., dict[str, NDArray[np.generic]]]], dict[str, NDArray[np.generic]]]

    def __call__(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        return self.change(dict(inputs), lambda changed: self.session(graph, changed))
