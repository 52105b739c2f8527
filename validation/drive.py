"""Runs a scenario on a session: builds the inputs of each call, chains the states, and picks the valid positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import NUM_LOGITS_TO_KEEP, PIXELS, TensorSpec, rounds_activations
from calque.choices import NARROW, QUANTIZED
from calque.errors import ParityFailed, UsageError
from calque.states import StateSpec
from calque.validation.images import images
from calque.validation.scenarios import PAD, Scenario, calls, pad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.artifact import Artifact
    from calque.session import Session

    Array = NDArray[np.generic]

PLAIN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "write_indices", "kv_lengths", NUM_LOGITS_TO_KEEP, PIXELS)
# How configs call the number of their layers.
DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# And those of each stage, where a model has stages.
STAGES = "depths"


@dataclass(frozen=True)
class ModelIO:
    """What the driver must know of a graph; the stages of one conversion share it.

    ``outputs`` are those that are no states. ``depth``: how many layers the config says the model has.
    ``step``: the graph that takes calls of one new token, where that is another.
    ``rounded``: the session rounds activations to 8 bits. ``routed``: experts are chosen by what came out of that.
    """

    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    depth: int = 1
    pad_id: int = 0
    precision: str = "fp32"
    rounded: bool = False
    routed: bool = False
    step: str | None = None

    @classmethod
    def of(cls, artifact: Artifact, exact: bool = False) -> ModelIO:
        """Return the IO of the artifact's graph; with ``exact`` of a session that rounds no activations.

        Raises:
            UsageError: the artifact has graphs that no rule chooses from.
        """
        name, step = artifact.graph_for(0), artifact.graph_for(1)
        if name is None:
            raise UsageError(f"nobody knows here which graph of {sorted(artifact.graphs)} to call")
        graph = artifact.graphs[name]
        kept = {state.output for state in artifact.states}
        config = artifact.config()
        pad_id = config.get("pad_token_id")
        return cls(
            name,
            graph.inputs,
            tuple(spec for spec in graph.outputs if spec.name not in kept),
            artifact.states,
            depth_of(config),
            # Some encoders know padding by its token; a generator sees the mask alone.
            pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0,
            _computed_in(artifact),
            not exact and rounds_activations(artifact),
            artifact.passes.get("fuse_experts", 0) > 0 or _chooses_experts(config),
            step,
        )

    @property
    def layers(self) -> int:
        """How many layers there are, as far as states and config tell; at least 1."""
        return max((self.depth, *(state.layer + 1 for state in self.states)))

    @property
    def in_slots(self) -> bool:
        """Whether keys and values lie in slots of a fixed number: a row's tokens fill its own from 0, padding takes none."""
        return any(state.update == "in_place" for state in self.states)

    @property
    def dtype(self) -> str:
        """What activations are computed in, as far as states and precision tell."""
        return self.states[0].dtype if self.states else NARROW.get(self.precision, "float32")


def _computed_in(artifact: Artifact) -> str:
    """Return the precision that activations have: that of the weights, unless an option or a pass says otherwise."""
    if artifact.recipe.get("options", {}).get("arithmetic") == "float32":
        return "fp32"
    codes = artifact.precision in QUANTIZED and artifact.passes.get("cast_precision", 0) > 0
    return "fp16" if codes else artifact.precision


def depth_of(config: Mapping[str, Any]) -> int:
    """Return how many layers a config says that the model has, those of all its stages; 1 where it does not say."""
    stages = config.get(STAGES)
    told = [sum(stages)] if isinstance(stages, list) and all(isinstance(size, int) for size in stages) else []
    return max([1, *told, *(size for key in DEPTHS if isinstance(size := config.get(key), int))])


def _chooses_experts(config: Mapping[str, Any]) -> bool:
    """Return whether a config, or a part of it, counts several experts."""
    return any(
        _chooses_experts(value) if isinstance(value, dict) else "experts" in key and isinstance(value, int) and value > 1
        for key, value in config.items()
    )


@dataclass(frozen=True)
class Answer:
    """What one call gave. ``history``: which position of its row each cache slot holds, PAD where none: [B, slots].

    ``keep``: how many positions' logits were asked for, 0 meaning all; None where the graph does not ask.
    """

    number: int
    index: NDArray[np.int64]
    history: NDArray[np.int64]
    beyond: tuple[bool, ...]
    keep: int | None
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Reached:
    """What one output says of one row's valid positions in one call: float [positions, size].

    An output that says one thing of the whole row has it at position 0.
    """

    call: int
    row: int
    positions: NDArray[np.int64]
    beyond: bool
    values: Array
    output: str = "logits"


def run(session: Session, io: ModelIO, scenario: Scenario) -> Iterator[Reached]:
    """Yield each row's outputs call by call; pad positions are left out.

    Raises:
        ParityFailed: an output is missing or has the wrong shape.
    """
    for answer in answers(session, io, scenario):
        for spec in io.outputs:
            yield from reached(answer, spec, io)


def answers(session: Session, io: ModelIO, scenario: Scenario) -> Iterator[Answer]:
    """Yield what each call gives, the states of one call being fed to the next.

    Raises:
        ParityFailed: a state output is missing or did not grow as its spec says.
        UsageError: the graph has an input that the driver cannot fill.
    """
    batch = len(scenario.prompts)
    rows = [np.asarray(row, dtype=np.int64) for row in scenario.rows]
    states: dict[str, Array] = {}
    history = np.full((batch, 0), PAD, dtype=np.int64)
    for number, call in enumerate(calls(scenario)):
        if call.fresh:
            states = {spec.input: _empty(spec, batch) for spec in io.states}
            history = history[:, :0]
        held, history = _held(history), np.concatenate([history, call.index], axis=1)
        tokens = np.stack([np.where(index == PAD, io.pad_id, row[index]) for row, index in zip(rows, call.index, strict=True)])
        plain = _plain_inputs(io, tokens, held, history, number)
        if io.in_slots:
            history = pad(_held(history), "right")
        outputs = session(io.step if io.step and tokens.shape[1] == 1 else io.graph, {**plain, **states})
        keep = int(plain[NUM_LOGITS_TO_KEEP]) if NUM_LOGITS_TO_KEEP in plain else None
        answer = Answer(number, call.index, history, call.beyond, keep, outputs)
        yield answer
        states = {spec.input: state_of(answer, spec) for spec in io.states}


def _held(history: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many tokens each row holds, int64 [B]."""
    return np.asarray((history != PAD).sum(axis=1), dtype=np.int64)


def _plain_inputs(
    io: ModelIO, tokens: NDArray[np.int64], held: NDArray[np.int64], history: NDArray[np.int64], number: int
) -> dict[str, Array]:
    """Return the inputs that are no states; a graph may lack some of them. ``held``: tokens of each row before the call."""
    names = {spec.name for spec in io.inputs} - {spec.input for spec in io.states}
    if unknown := sorted(names - set(PLAIN_INPUTS)):
        raise UsageError("the parity gate cannot fill these inputs of the graph", unknown, "give them a rule in calque/validation/drive.py")
    mask = (history != PAD).astype(np.int64)
    new = slice(mask.shape[1] - tokens.shape[1], None)
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    everything: dict[str, Array] = {
        "input_ids": tokens,
        "attention_mask": mask,
        "token_type_ids": segments(mask, positions)[:, new],
        "position_ids": np.ascontiguousarray(positions[:, new]),
        "write_indices": held,
        "kv_lengths": _held(history).astype(np.int32),
        # 0 keeps all; pieces of a prompt and every other step ask for the last one alone.
        NUM_LOGITS_TO_KEEP: np.array(number % 2, dtype=np.int64),
    }
    everything |= {spec.name: images(tokens[:, 0], spec) for spec in io.inputs if spec.name == PIXELS}
    return {name: array for name, array in everything.items() if name in names}


def _empty(spec: StateSpec, batch: int) -> Array:
    """Return the state before the first token: nothing along the axis that grows, zeros where it does not."""
    dims = {"batch_size": batch, "past_sequence_length": 0}
    shape = [dims[size] if isinstance(size, str) else size for size in spec.shape]
    return np.zeros(shape, dtype=numpy_dtype(spec.dtype))


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """Return the dtype of that name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def state_of(answer: Answer, spec: StateSpec) -> Array:
    """Return the state after the call.

    Raises:
        ParityFailed: it is missing, or did not grow to the slots the call has filled.
    """
    if spec.output not in answer.outputs:
        raise ParityFailed(f"output {spec.output} is missing")
    state = answer.outputs[spec.output]
    slots = answer.history.shape[1]
    if spec.update == "append" and spec.grow_axis is not None:
        length = state.shape[spec.grow_axis] if state.ndim == len(spec.shape) else None
        if length != slots:
            raise ParityFailed(f"{spec.output} has shape {list(state.shape)}, {slots} slots expected along axis {spec.grow_axis}")
    return state


def segments(mask: Array, positions: Array) -> NDArray[np.int64]:
    """Return a text's segments, [B, S]: the first half of each row is one, the rest another; 0 at padding."""
    lengths = mask.sum(axis=1, keepdims=True)
    return np.asarray((2 * positions >= lengths) & (mask != 0), dtype=np.int64)


def reached(answer: Answer, spec: TensorSpec, io: ModelIO) -> Iterator[Reached]:
    """Yield one output at valid positions, row by row; logits may be those of all columns or of the last ones.

    Raises:
        ParityFailed: it is missing or has the wrong shape.
    """
    batch, width = answer.index.shape
    values = answer.outputs.get(spec.name)
    if values is None:
        raise ParityFailed(f"output {spec.name} is missing")
    if "sequence_length" not in spec.shape and not io.states:
        _require_shape(spec.name, values, f"[{batch}, {spec.shape[-1]}]", values.ndim == 2 and values.shape[0] == batch)
        for row in range(batch):
            yield Reached(answer.number, row, np.zeros(1, dtype=np.int64), answer.beyond[row], values[row : row + 1], spec.name)
        return
    if len(spec.shape) == 2 and values.ndim == 2:
        values = values[:, :, None]
    allowed: tuple[int | None, ...] = (width,)
    if io.states:
        allowed = {None: (width, 1), 0: (width,)}.get(answer.keep, (answer.keep,))
    sizes = " or ".join(str(size) for size in sorted(set(allowed), key=str))
    fits = values.ndim == 3 and values.shape[0] == batch and values.shape[1] in allowed
    _require_shape(spec.name, values, f"[{batch}, {sizes}, {'vocabulary' if io.states else spec.shape[-1]}]", fits)
    kept = values.shape[1]
    for row in range(batch):
        index = answer.index[row, width - kept :]
        valid = np.flatnonzero(index != PAD)
        if len(valid):
            # A view where nothing is dropped: one row's logits may be hundreds of megabytes.
            chosen = values[row] if len(valid) == kept else values[row, valid[0] : valid[-1] + 1]
            yield Reached(answer.number, row, index[valid], answer.beyond[row], chosen, spec.name)


def _require_shape(name: str, values: Array, expected: str, fits: bool) -> None:
    if not fits:
        raise ParityFailed(f"{name} has shape {list(values.shape)}, {expected} expected")
