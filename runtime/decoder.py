"""Rows of tokens continued call by call. Their states stay where ONNX Runtime has them: neither they nor the logits are copied.

::

    update: append, replace   each call's outputs are the next call's inputs; numpy and ONNX Runtime see the same memory
    append, read by           one buffer with room to grow is input and output at once: the operator adds the new slots in it,
    GroupQueryAttention alone   instead of writing the whole cache once more in each call
    update: in_place          the same, in a buffer of the length that the artifact has (static cache)

Measured with onnxruntime 1.31.1 on a Llama of 135M in fp32: a buffer that is shared saves a seventh of a step's CPU time at
500 to 1500 tokens. ``run`` with numpy arrays costs less than OrtValues that are handed on, and copies no more than they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import NUM_LOGITS_TO_KEEP, Artifact
from calque.errors import TargetUnavailable, Unsupported, UsageError
from calque.runtime.limits import check_limits
from calque.runtime.onnx_file import OnnxFile
from calque.runtime.onnxruntime_session import OnnxRuntimeSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.session import Session
    from calque.states import StateSpec

    Array = NDArray[np.generic]
    Ints = NDArray[np.int64]

# Inputs that follow from the tokens and their mask.
FED = {"input_ids", "attention_mask", "position_ids", "write_indices", "kv_lengths", NUM_LOGITS_TO_KEEP}
# Slots by which a shared buffer grows at least.
ROOM = 256
# Kinds of state that have a slot for each token, along axis 2.
SLOTTED = ("key", "value")


class Decoder:
    """``rows`` rows of an artifact of one graph, empty at first. ``lengths`` [rows] int64: how many tokens each holds."""

    def __init__(self, artifact: Artifact, session: Session, rows: int = 1) -> None:
        """Be ready for the first call.

        Raises:
            Unsupported: the artifact keeps no states, or has graphs that no rule chooses from.
            ArtifactUnreadable: its graph cannot be read.
        """
        if not artifact.states:
            raise Unsupported(f"{artifact.folder} keeps no states: it continues no text", fix="run its graph, as docs/artifact.md shows")
        if rows < 1:
            raise UsageError(f"{rows} rows cannot be decoded, 1 or more expected")
        graph = artifact.graph_for(0)
        if graph is None:
            raise Unsupported(f"nobody knows here which graph of {sorted(artifact.graphs)} to call", fix="use the artifact's own runtime")
        self.artifact, self.rows = artifact, rows
        self._spec = artifact.graphs[graph]
        states = {state.input for state in artifact.states}
        self._vocabulary = next((tensor.shape[-1] for tensor in self._spec.outputs if tensor.name == "logits"), None)
        self._names = {tensor.name for tensor in self._spec.inputs} - states
        if other := sorted(self._names - FED):
            raise Unsupported(f"nobody knows here what to feed {self._spec.file}", other, "use the artifact's own runtime")
        self._states = _states(artifact, session, rows)
        self.reset()

    def reset(self) -> None:
        """Every row is empty."""
        self.lengths: Ints = np.zeros(self.rows, np.int64)
        self._mask: Ints = np.zeros((self.rows, 0), np.int64)
        self._states.clear()

    def reserve(self, slots: int) -> None:
        """Up to ``slots`` columns, padding among them, fit without a buffer being made anew; more fit too."""
        self._states.reserve(slots)

    def __call__(self, ids: Ints, mask: Ints | None = None) -> Array:
        """Return the logits ``[rows, new, vocabulary]`` of new tokens; of the last alone where every row has one there and the graph can.

        ``ids`` [rows, new] int64; ``mask`` [rows, new] is 0 where they are padding, which belongs where the artifact takes it.

        Raises:
            UsageError: the shapes do not fit, or the ids are no whole numbers or none of the model's.
            Unsupported: the call goes past a limit that the manifest records, or the end of a static cache.
        """
        ids = _whole_numbers(ids, "tokens", self._vocabulary)
        new = np.ones(ids.shape, np.int64) if mask is None else _whole_numbers(mask, "their mask", 2)
        if ids.ndim != 2 or ids.shape[0] != self.rows or not ids.shape[1] or new.shape != ids.shape:
            shapes = f"tokens have shape {list(ids.shape)} and their mask {list(new.shape)}"
            raise UsageError(f"{shapes}, [{self.rows}, 1 or more] expected of both")
        whole = np.concatenate([self._before(), new], axis=1)
        feed: dict[str, Array] = {
            "input_ids": np.ascontiguousarray(ids),
            "attention_mask": whole,
            # A token's position counts true tokens of its row alone.
            "position_ids": self.lengths[:, None] + np.clip(new.cumsum(1) - 1, 0, None),
            "write_indices": self.lengths,
            "kv_lengths": (self.lengths + new.sum(1)).astype(np.int32),
            NUM_LOGITS_TO_KEEP: np.array(1 if new[:, -1].all() else 0, np.int64),
        }
        fed = {name: array for name, array in feed.items() if name in self._names}
        # A graph that takes no mask has the limits of one all the same; slots say theirs by themselves.
        check_limits(self.artifact.limits, fed if "write_indices" in fed else {**fed, "attention_mask": whole})
        logits = self._states(fed, whole.shape[1])
        self.lengths, self._mask = self.lengths + new.sum(1), whole
        return logits

    def _before(self) -> Ints:
        """Return the mask of what the cache holds: [rows, slots]."""
        if not self._states.compact:
            return self._mask
        slots = np.arange(int(self.lengths.max()))
        return (slots < self.lengths[:, None]).astype(np.int64)


def _states(artifact: Artifact, session: Session, rows: int) -> _HandedOn | _Shared:
    """Return what keeps the states of an artifact."""
    if not isinstance(session, OnnxRuntimeSession):
        return _HandedOn(artifact, session, rows)
    if any(state.dtype == "bfloat16" for state in artifact.states):
        raise TargetUnavailable(
            "ONNX Runtime takes no bfloat16 of numpy, in which this artifact carries its states", fix="run it on its device"
        )
    static = any(state.update == "in_place" for state in artifact.states)
    grows = all(state.update == "append" for state in artifact.states)
    [(graph, spec)] = artifact.graphs.items()
    file = artifact.folder / spec.file
    # Another format that ONNX Runtime opens, such as its own, does not say what reads the states.
    if static or (grows and file.suffix == ".onnx" and OnnxFile.read(file).shares_buffers(artifact.states)):
        return _Shared(artifact.states, session, graph, rows)
    return _HandedOn(artifact, session.run, rows)


class _HandedOn:
    """States that are outputs of one call and inputs of the next."""

    def __init__(self, artifact: Artifact, run: Any, rows: int) -> None:
        self._artifact, self._run, self._rows = artifact, run, rows
        # Where they grow padding keeps its slots, and a static cache has none for it.
        self.compact = any(state.update == "in_place" for state in artifact.states)
        self._arrays: dict[str, Array] = {}

    def clear(self) -> None:
        self._arrays = {state.input: _zeros(state, self._rows, 0) for state in self._artifact.states}

    def reserve(self, slots: int) -> None:
        """Have room as it is: each call makes its outputs as long as they must be."""

    def __call__(self, feed: Mapping[str, Array], filled: int) -> Array:
        outputs: dict[str, Array] = self._run(self._artifact.graph_for(feed["input_ids"].shape[1]), {**feed, **self._arrays})
        self._arrays = {state.input: outputs[state.output] for state in self._artifact.states}
        return outputs["logits"]


class _Shared:
    """States that stay in one buffer each, bound as input and output; those that are replaced are handed on beside them."""

    def __init__(self, states: Sequence[StateSpec], session: OnnxRuntimeSession, graph: str, rows: int) -> None:
        self._kept = [state for state in states if state.update != "replace"]
        self._replaced = [state for state in states if state.update == "replace"]
        self._session, self._graph, self._rows = session, graph, rows
        lengths = {state.shape[2] for state in self._kept if state.kind in SLOTTED}
        self._longest = min((size for size in lengths if isinstance(size, int)), default=None)
        self.compact = self._longest is not None  # a static cache has no slots for padding
        self._capacity = self._filled = 0
        self._binding: Any = None
        self._buffers: dict[str, Array] = {}
        self._inputs: dict[str, Any] = {}  # what is bound lives as long as it is bound

    def clear(self) -> None:
        for state in self._kept if self._buffers else ():
            # A NaN that an earlier text left would come through masks, which multiply by zero.
            self._used(state)[:] = 0
        self._filled = 0
        for state in self._replaced:
            self._inputs[state.input] = _zeros(state, self._rows, 0)

    def reserve(self, slots: int) -> None:
        slots = self._longest or slots
        if slots <= self._capacity:
            return
        for state in self._kept:
            buffer = _zeros(state, self._rows, slots)
            if self._filled:
                buffer[:, :, : self._filled] = self._used(state)
            self._buffers[state.input] = buffer
        self._capacity = slots
        self._bind()

    def _used(self, state: StateSpec) -> Array:
        buffer = self._buffers[state.input]
        return buffer[:, :, : self._filled] if state.kind in SLOTTED else buffer

    def _bind(self) -> None:
        from onnxruntime import OrtValue

        self._binding = self._session.opened(self._graph).io_binding()
        self._binding.bind_output("logits")  # the first output that is bound is the first that comes back
        for state in self._replaced:
            self._binding.bind_output(state.output)
        for state in self._kept:
            value = OrtValue.ortvalue_from_numpy(self._buffers[state.input])
            self._inputs[state.input] = value
            self._binding.bind_ortvalue_input(state.input, value)
            self._binding.bind_ortvalue_output(state.output, value)

    def __call__(self, feed: Mapping[str, Array], filled: int) -> Array:
        from onnxruntime import OrtValue

        if self._longest is not None and filled > self._longest:
            raise Unsupported(
                f"a row would fill {filled} slots, padding among them, the artifact's max_length is {self._longest}",
                fix="cut the prompt, or stop generating there",
            )
        if filled > self._capacity:
            self.reserve(max(filled, self._capacity + max(ROOM, self._capacity // 2)))
        replaced = {state.input: self._inputs[state.input] for state in self._replaced}
        for name, array in {**feed, **replaced}.items():
            self._inputs[name] = array
            self._binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name in ("logits", *(state.output for state in self._replaced)):
            self._binding.bind_output(name)  # anew: an output of the call before would have to have this one's shape
        with self._session.explained(self._graph):
            self._session.opened(self._graph).run_with_iobinding(self._binding)
        self._filled = max(self._filled, filled)
        outputs = self._binding.get_outputs_as_ortvaluevector()
        for place, state in enumerate(self._replaced, start=1):
            self._inputs[state.input] = outputs[place].numpy()
        logits: Array = outputs[0].numpy()
        return logits


def _whole_numbers(values: Any, called: str, below: int | str | None) -> Ints:
    """Return the values as int64.

    Raises:
        UsageError: they are something else, below 0, or too large.
    """
    given = np.asarray(values)
    if given.dtype.kind not in "iub":
        raise UsageError(f"{called} are of type {given.dtype}, whole numbers expected")
    numbers = given.astype(np.int64)
    least, most = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
    if least < 0 or (isinstance(below, int) and most >= below):
        raise UsageError(f"{called} hold {least if least < 0 else most}, 0 to {below - 1 if isinstance(below, int) else '…'} expected")
    return numbers


def _zeros(state: StateSpec, rows: int, slots: int) -> Array:
    """Return a state before its first token, with room for ``slots`` where it grows."""
    dims = {"batch_size": rows, "past_sequence_length": slots}
    if state.dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  # numpy knows the type by its name from then on
    return np.zeros([dims[size] if isinstance(size, str) else size for size in state.shape], dtype=state.dtype)
