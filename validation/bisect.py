"""Where a failing scenario goes wrong first: which stage of the conversion, and which layer of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calque.errors import CalqueError, ParityFailed
from calque.validation.compare import Row, compare
from calque.validation.drive import Answer, ModelIO, answers, state_of
from calque.validation.scenarios import PAD
from calque.validation.tolerance import tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.session import Session
    from calque.states import StateSpec
    from calque.validation.reference import Reference
    from calque.validation.scenarios import Scenario

Stage = tuple[str, "Callable[[], Session]"]
# The keys and values of one row alone, by output name, [1, heads, tokens, size]; None where only stages can be compared.
EagerStates = Callable[[Sequence[int]], Mapping[str, "NDArray[np.float32]"]]


@dataclass(frozen=True)
class Divergence:
    """The first stage that fails, the layer and kind of its first wrong state (None: none is wrong), and how to say it."""

    stage: str
    layer: int | None
    kind: str | None
    text: str


@dataclass(frozen=True)
class _Gap:
    """How far one state output lies from what it should be, in σ of that."""

    layer: int
    kind: str
    sigma: float


def bisect(
    stages: Sequence[Stage], io: ModelIO, scenario: Scenario, reference: Reference, eager: EagerStates | None = None
) -> Divergence | None:
    """Return where the scenario first diverges, None if every stage passes it.

    ``stages`` are in pipeline order and share ``io``. States are compared with the eager model's for each row alone or,
    without ``eager``, with those of the stage before, if that one passed.
    """
    before: Session | None = None
    for name, open_stage in stages:
        session = open_stage()
        row = compare(session, io, scenario, reference)
        if row["status"] == "failed":
            return _within(name, session, io, scenario, row, _expected(io, scenario, before, eager))
        before = session
    return None


Expected = Callable[[Answer], "Callable[[StateSpec, int], NDArray[np.generic]]"]


def _expected(io: ModelIO, scenario: Scenario, before: Session | None, eager: EagerStates | None) -> Expected | None:
    """Return what gives, for a call, the expected state of one row at its valid positions: [heads, positions, size]."""
    if eager is not None:

        def from_eager(answer: Answer) -> Callable[[StateSpec, int], NDArray[np.generic]]:
            known: dict[int, Mapping[str, NDArray[np.float32]]] = {}

            def state(spec: StateSpec, row: int) -> NDArray[np.generic]:
                if row not in known:
                    known.clear()  # one row's states at a time
                    known[row] = eager(scenario.rows[row][: int(answer.history[row].max()) + 1])
                whole: NDArray[np.generic] = known[row][spec.output][0]
                return whole

            return state

        return from_eager
    if before is None:
        return None
    # Both are driven in step, so that only one call's outputs of each are held.
    earlier = answers(before, io, scenario)

    def from_stage(answer: Answer) -> Callable[[StateSpec, int], NDArray[np.generic]]:
        same = next(earlier)
        return lambda spec, row: _valid(spec, same, row)

    return from_stage


def _valid(spec: StateSpec, answer: Answer, row: int) -> NDArray[np.generic]:
    slots = np.flatnonzero(answer.history[row] != PAD)
    taken: NDArray[np.generic] = np.take(state_of(answer, spec)[row], slots, axis=(spec.grow_axis or 2) - 1)
    return taken


def _within(stage: str, session: Session, io: ModelIO, scenario: Scenario, failed: Row, expected: Expected | None) -> Divergence:
    """Return the first call's first layer whose state is wrong."""
    limit = tolerance(io.dtype).limit(io.layers)
    specs = sorted((spec for spec in io.states if spec.update == "append"), key=lambda spec: spec.layer)
    head = f"first diverges at stage '{stage}'"
    if scenario.refuse:
        return Divergence(stage, None, None, f"{head}: {failed['reason']}")
    if expected is None or not specs:
        return Divergence(stage, None, None, f"{head}: {failed['reason']}; there are no states to compare")
    try:
        for answer in answers(session, io, scenario):
            gaps = _gaps(specs, answer, expected(answer))
            wrong = [gap for gap in gaps if not gap.sigma <= limit]
            if wrong:
                return _named(stage, f"{head}, ", gaps, wrong, answer.number)
    except (CalqueError, KeyError, ValueError) as error:
        what = error.what if isinstance(error, ParityFailed) else f"{type(error).__name__}: {error}"
        return Divergence(stage, None, None, f"{head}: {what}")
    last = specs[-1].layer
    text = f"{head}, after layer {last}'s attention (its MLP, final norm or head): {failed['reason']} (layers 0–{last} agree)"
    return Divergence(stage, None, None, text)


def _gaps(specs: Sequence[StateSpec], answer: Answer, expected: Callable[[StateSpec, int], NDArray[np.generic]]) -> list[_Gap]:
    worst = {(spec.layer, spec.kind): 0.0 for spec in specs}
    for row in range(answer.history.shape[0]):
        if answer.history[row].max() == PAD:
            continue
        for spec in specs:
            want = np.asarray(expected(spec, row), dtype=np.float32)
            got = np.asarray(_valid(spec, answer, row), dtype=np.float32)
            key = (spec.layer, spec.kind)
            worst[key] = max(worst[key], _distance(want, got))
    return [_Gap(layer, kind, sigma) for (layer, kind), sigma in worst.items()]


def _distance(want: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return max |Δ| in σ of the expected state; infinity where shapes differ or a value is not finite."""
    if want.shape != got.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.abs(want - got).max() / (want.std() or 1.0))


def _named(stage: str, head: str, gaps: Sequence[_Gap], wrong: Sequence[_Gap], call: int) -> Divergence:
    first = wrong[0]
    kinds = [gap.kind for gap in wrong if gap.layer == first.layer]
    size = f"{first.sigma:.1e} σ" if math.isfinite(first.sigma) else "NaN, infinity or another shape"
    below = [gap.sigma for gap in gaps if gap.layer < first.layer]
    text = f"{head}layer {first.layer} {' and '.join(kinds)}: {size} in call {call}"
    if below:
        layers = sorted({gap.layer for gap in gaps if gap.layer < first.layer})
        named = f"layer {layers[0]} agrees" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]} agree"
        text += f" ({named} to {max(below):.0e})"
        if len(kinds) > 1:
            # Both wrong at once: what feeds them is, and that lies before this layer's projections.
            text += f"; the fault lies between layer {layers[-1]}'s cache and layer {first.layer}'s"
    return Divergence(stage, first.layer, first.kind, text)
