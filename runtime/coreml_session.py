"""A Core ML package run here: by Core ML on macOS, elsewhere by the interpreter of MIL."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import Artifact, GraphSpec
from calque.errors import ArtifactUnreadable, TargetUnavailable, UsageError
from calque.runtime.artifact_session import REDO, ArtifactSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.generic]]
    # What runs a function: inputs, and what its states hold, which it changes.
    Run = Callable[[Arrays, Arrays], Arrays]

INTERPRETER, CORE_ML = "MIL interpreter", "Core ML"
# The function of a graph that is alone.
MAIN = "main"
# Rows of a call that a package takes where its recipe names no other number.
MAX_BATCH = 8


def on_mac() -> bool:
    """Return whether Core ML itself is here."""
    return sys.platform == "darwin"


def io_name(name: str) -> str:
    """Return a name of the artifact as Core ML takes it: ``past_key_values_0_key``."""
    return re.sub(r"\W", "_", name)


def function_name(graph: str) -> str:
    """Return the name of a graph's function in the package."""
    return MAIN if graph == "model" else graph


class CoreMLSession(ArtifactSession):
    """Runs functions of a package as the manifest describes its graphs: names, int64, an empty past and caches of several rows.

    Core ML has none of these. Whole numbers go in as int32; an empty past as one slot that the mask hides, which is taken off what
    comes out; more rows than it takes at once in several calls, and rows whose cache is a state one after the other, each with a state
    of its own, whose slots come in and go out as arrays.
    """

    def __init__(self, artifact: Artifact, threads: int = 0) -> None:
        super().__init__(artifact, threads)
        self.by = CORE_ML if on_mac() else INTERPRETER
        self._open: dict[str, Run] = {}
        self._stateful = any(state.update == "in_place" for state in artifact.states)

    def open_all(self) -> None:
        """Every graph is open, and can be run.

        Raises:
            Unsupported: the interpreter has no kernel for operators of the package, which are named.
            ArtifactUnreadable: the package is damaged, or Core ML refuses it.
            TargetUnavailable: on macOS, coremltools is not installed.
        """
        for graph in self.artifact.graphs:
            self._opened(graph)

    def run(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Return every output of ``graph`` by name, its inputs unchecked.

        Raises:
            UsageError: no such graph.
            Unsupported: the interpreter has no kernel for an operator of the package.
            ArtifactUnreadable: the package is damaged, or Core ML refuses it.
            TargetUnavailable: on macOS, coremltools is not installed.
        """
        spec = self.spec(graph)
        run = self._opened(graph)
        answer = self._row if self._stateful else self._rows
        most = 1 if self._stateful else int(self.artifact.recipe.get("options", {}).get("max_batch", MAX_BATCH))
        starts = range(0, max(1, _batch(inputs)), most)
        parts = [answer(spec, run, {name: array[at : at + most] for name, array in inputs.items()}) for at in starts]
        return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _rows(self, spec: GraphSpec, run: Run, inputs: Arrays) -> Arrays:
        """Return what no more rows than the package takes give, caches among it."""
        given = dict(inputs)
        empty = [state for state in self.artifact.states if not inputs[state.input].shape[2]]
        if empty:
            given |= {state.input: np.zeros_like(inputs[state.input], shape=_one_slot(inputs[state.input])) for state in empty}
            mask = inputs["attention_mask"]
            given["attention_mask"] = np.concatenate([np.zeros_like(mask, shape=(mask.shape[0], 1)), mask], axis=1)
        found = run(_renamed(given), {})
        named = {tensor.name: found[io_name(tensor.name)] for tensor in spec.outputs}
        return named | {state.output: named[state.output][:, :, 1:] for state in empty}

    def _row(self, spec: GraphSpec, run: Run, inputs: Arrays) -> Arrays:
        """Return what one row gives, and its state afterwards."""
        states = {io_name(state.input): np.array(inputs[state.input]) for state in self.artifact.states}
        kept = {state.input for state in self.artifact.states}
        found = run(_renamed({name: array for name, array in inputs.items() if name not in kept}), states)
        named = {state.output: states[io_name(state.input)] for state in self.artifact.states}
        return named | {tensor.name: found[io_name(tensor.name)] for tensor in spec.outputs if tensor.name not in named}

    def _opened(self, graph: str) -> Run:
        if graph not in self._open:
            path = self.artifact.folder / self.spec(graph).file
            if not path.is_dir():
                raise ArtifactUnreadable(f"{path} is missing, though the manifest names it", fix=REDO)
            function = function_name(graph)
            if self.by == INTERPRETER:
                self._open[graph] = _interpreted(path, function)
            else:
                self._open[graph] = _loaded(path, function if len(self.artifact.graphs) > 1 else None)
        return self._open[graph]


def _batch(inputs: Mapping[str, NDArray[np.generic]]) -> int:
    return len(next(iter(inputs.values())))


def _one_slot(past: NDArray[np.generic]) -> tuple[int, ...]:
    batch, heads, _, size = past.shape
    return batch, heads, 1, size


def _renamed(inputs: Arrays) -> Arrays:
    """Return the inputs as the package takes them."""
    whole = {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in inputs.items()}
    return {io_name(name): np.ascontiguousarray(array) for name, array in whole.items()}


def _interpreted(path: Path, function: str) -> Run:
    """Return what runs a function by the interpreter of MIL."""
    from calque.runtime.mil import MilProgram, MilState

    try:
        program = MilProgram(path, function)
    except UsageError as error:  # of whoever asks for a function; here it is the manifest that does
        raise ArtifactUnreadable(f"{path} is not the package that the manifest describes: {error.what}", fix=REDO) from error

    def run(inputs: Arrays, states: Arrays) -> Arrays:
        kept = MilState(states)  # which it changes
        known = {name: array for name, array in inputs.items() if name in program.inputs}
        return program(known, kept if states else None)

    return run


def _loaded(path: Path, function: str | None) -> Run:
    """Return what runs a function by Core ML. Not run: no Mac was at hand."""
    try:
        from coremltools.models import MLModel
    except ImportError as error:
        raise TargetUnavailable(f"coremltools cannot be imported: {error}", fix="pip install 'calque[coreml]'") from error
    try:
        model: Any = MLModel(str(path), function_name=function)
    except Exception as error:  # Core ML's errors share no class but this
        raise ArtifactUnreadable(f"Core ML refuses {path}: {error}", fix=REDO) from error

    def run(inputs: Arrays, states: Arrays) -> Arrays:
        held: Any = model.make_state() if states else None
        for name, array in states.items():
            held.write_state(name, array)
        try:
            found: Arrays = model.predict(inputs, state=held) if states else model.predict(inputs)
        except Exception as error:  # as above
            raise ArtifactUnreadable(f"Core ML failed while running {path}: {error}", fix=REDO) from error
        for name in states:
            states[name] = np.array(held.read_state(name))
        return found

    return run
