"""Parity inside the model: how far each layer's keys and values lie from those of the eager model, row by row alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.errors import Unsupported
from calque.states import StateSpec
from calque.validation.drive import Answer, ModelIO, answers, state_of
from calque.validation.eager import eager_states
from calque.validation.scenarios import PAD
from calque.validation.tolerance import tolerance

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from calque.session import Session
    from calque.validation.scenarios import Scenario

# The keys and values of one row alone, by output name, [1, heads, tokens, size]; None where only stages can be compared.
EagerStates = Callable[[Sequence[int]], Mapping[str, "NDArray[np.float32]"]]
# The same of several rows, by their tokens.
StatesOfRows = Mapping[tuple[int, ...], Mapping[str, "NDArray[np.float32]"]]
# The state of one row at its valid positions: [heads, positions, size].
StateOf = Callable[[StateSpec, int], "NDArray[np.generic]"]


@dataclass(frozen=True)
class Gap:
    """How far one state output lies from what it should be, in σ of that."""

    layer: int
    kind: str
    sigma: float


def telling_scenario(scenarios: Sequence[Scenario]) -> Scenario | None:
    """Return the scenario that says most of the layers: rows padded before, with steps; or the next best that may run."""
    allowed = [scenario for scenario in scenarios if not scenario.refuse and not scenario.not_run]
    return max(allowed, key=lambda s: (bool(s.decode) and s.padding != "none", s.padding == "left", bool(s.decode)), default=None)


def states_alone(model: torch.nn.Module, scenario: Scenario) -> tuple[StatesOfRows, str]:
    """Return the untouched model's states of each row of the scenario alone, or none and the sentence that says why."""
    try:
        return {row: eager_states(model, row) for row in scenario.rows}, ""
    except Exception as error:  # the model's own code, given a cache that it may not know; logits are judged all the same
        return {}, _not_compared(scenario, error)


def _not_compared(scenario: Scenario, error: Exception) -> str:
    return f"Layers could not be compared in {scenario.name}: {type(error).__name__}: {error}".replace("\n", " ")


def layer_parity(session: Session, io: ModelIO, scenario: Scenario, eager: StatesOfRows) -> tuple[tuple[Mapping[str, Any], ...], str]:
    """Return one row a layer and kind, ``{layer, kind, worst_sigma, limit, scenario}``, or none and the sentence that says why.

    ``eager``: the states of each of the scenario's rows alone. Those after the last call hold every position that any
    call added, so they are compared once. A worst figure of None means NaN, infinity or another shape.
    """
    specs = growing_states(io)
    if not specs:
        return (), ""
    try:
        last = deque(answers(session, io, scenario), maxlen=1).pop()
        gaps = gaps_of(specs, last, from_eager(lambda tokens: eager[tuple(tokens)], scenario, last))
    except Exception as error:  # a session is foreign code; that it crashes is for the gate to say
        return (), _not_compared(scenario, error)
    limit = tolerance(io.dtype).limit(io.layers)
    rows = (
        {
            "layer": gap.layer,
            "kind": gap.kind,
            # JSON has no infinity.
            "worst_sigma": gap.sigma if math.isfinite(gap.sigma) else None,
            "limit": limit,
            "scenario": scenario.name,
        }
        for gap in gaps
    )
    return tuple(rows), ""


def growing_states(io: ModelIO) -> list[StateSpec]:
    """Return the states that hold every position, by layer: those whose values can be compared one by one."""
    return sorted((spec for spec in io.states if spec.update in ("append", "in_place")), key=lambda spec: spec.layer)


def from_eager(eager: EagerStates, scenario: Scenario, answer: Answer) -> StateOf:
    """Return what gives the state that eager computes for a row as long as it was after the call."""
    known: dict[int, Mapping[str, NDArray[np.float32]]] = {}

    def state(spec: StateSpec, row: int) -> NDArray[np.generic]:
        if row not in known:
            known.clear()  # one row's states at a time
            known[row] = eager(scenario.rows[row][: int(answer.history[row].max()) + 1])
        if spec.output not in known[row]:
            raise Unsupported(f"the eager model's cache has no {spec.output}")
        whole: NDArray[np.generic] = known[row][spec.output][0]
        return whole

    return state


def gaps_of(specs: Sequence[StateSpec], answer: Answer, expected: StateOf) -> list[Gap]:
    """Return how far each state of the call lies from ``expected`` at the valid positions, the worst row counting."""
    worst = {(spec.layer, spec.kind): 0.0 for spec in specs}
    for row in range(answer.history.shape[0]):
        if answer.history[row].max() == PAD:
            continue
        for spec in specs:
            want = np.asarray(expected(spec, row), dtype=np.float32)
            got = np.asarray(valid_slots(spec, answer, row), dtype=np.float32)
            key = (spec.layer, spec.kind)
            worst[key] = max(worst[key], _distance(want, got))
    return [Gap(layer, kind, sigma) for (layer, kind), sigma in worst.items()]


def valid_slots(spec: StateSpec, answer: Answer, row: int) -> NDArray[np.generic]:
    """Return one row's state without the slots of padding: [heads, positions, size]."""
    slots = np.flatnonzero(answer.history[row] != PAD)
    taken: NDArray[np.generic] = np.take(state_of(answer, spec)[row], slots, axis=(spec.grow_axis or 2) - 1)
    return taken


def _distance(want: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return max |Δ| in σ of the expected state; infinity where shapes differ or a value is not finite."""
    if want.shape != got.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.abs(want - got).max() / (want.std() or 1.0))
