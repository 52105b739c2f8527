"""The artifacts as one thing: logits for a call, the cache kept in between."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.padding.case import LENGTHS, SHAPE, Call, calls, own

# The layer and the kind, whatever else a name says: past_key_values.0.key, present.0.key, input.past_key_values.layers.0.keys.
STATE = re.compile(r"\.(\d+)\.(key|value)")
State = dict[tuple[str, ...], NDArray[np.float32]]


class Model(Protocol):
    """An artifact that is open, its cache empty."""

    def answer(self, call: Call) -> NDArray[np.float32]:
        """Return the logits of every new column: ``[rows, columns, vocabulary]``; these are in the cache now."""


def drive(model: Model, side: str) -> list[NDArray[np.float32]]:
    """Return the logits of each row's own tokens."""
    return own(side, [model.answer(call) for call in calls(side)])


def empty(names: list[str]) -> State:
    """Return the empty cache of the inputs."""
    shape = (len(LENGTHS), SHAPE.kv_heads, 0, SHAPE.head_dim)
    return {found.groups(): np.zeros(shape, np.float32) for name in names if (found := STATE.search(name))}


def named(names: list[str], call: Call, state: State) -> dict[str, NDArray[Any]]:
    """Return what a graph with these inputs is fed."""
    values: dict[str, NDArray[Any]] = {"input_ids": call.ids, "attention_mask": call.mask, "position_ids": call.positions}
    fed = {name: values[name] for name in names if name in values}
    return fed | {name: state[found.groups()] for name in names if (found := STATE.search(name))}


def states(outputs: dict[str, NDArray[np.float32]]) -> State:
    """Return the cache that the outputs hold."""
    return {found.groups(): array for name, array in outputs.items() if (found := STATE.search(name))}


class Graphs:
    """Graphs in ONNX Runtime; ``later``, where there is one, continues what ``first`` began."""

    def __init__(self, first: Path, later: Path | None = None) -> None:
        import onnxruntime

        opened = [onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (first, later) if path]
        self._first, self._later = opened[0], opened[-1]
        self._state: State | None = None

    def answer(self, call: Call) -> NDArray[np.float32]:
        """Return the logits of every new column."""
        session = self._first if self._state is None else self._later
        names = [value.name for value in session.get_inputs()]
        state = empty(names) if self._state is None else self._state
        told = [value.name for value in session.get_outputs()]
        outputs = dict(zip(told, session.run(told, named(names, call, state)), strict=True))
        self._state = states(outputs)
        logits: NDArray[np.float32] = outputs["logits"]
        return logits


class Artifact:
    """An artifact of Calque's in its own session, which refuses what the artifact cannot do."""

    def __init__(self, folder: Path) -> None:
        from calque.runtime.session import open_session

        self._session = open_session(folder)
        self._names = [tensor.name for tensor in self._session.artifact.graphs["model"].inputs]
        self._state = empty(self._names)

    def answer(self, call: Call) -> NDArray[np.float32]:
        """Return the logits of every new column.

        Raises:
            calque.errors.Unsupported: the artifact does not take such padding.
        """
        outputs = self._session("model", named(self._names, call, self._state))
        self._state = states(outputs)
        return outputs["logits"]


class Stateful:
    """A model of OpenVINO's that keeps its cache as state, in float32."""

    def __init__(self, folder: Path) -> None:
        import openvino  # type: ignore[import-not-found]  # of the peer's environment

        precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self._request = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", precision).create_infer_request()
        self._names = {name for port in self._request.model_inputs for name in port.names}

    def answer(self, call: Call) -> NDArray[np.float32]:
        """Return the logits of every new column."""
        fed = named([*self._names], call, {}) | {"beam_idx": np.arange(len(LENGTHS), dtype=np.int32)}
        self._request.infer(fed)
        logits: NDArray[np.float32] = self._request.get_tensor("logits").data.copy()
        return logits
