"""Where a failing scenario goes wrong first: which stage of the conversion, and which layer of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calque.errors import CalqueError, ParityFailed
from calque.validation.compare import Row, compare
from calque.validation.drive import Answer, ModelIO, answers
from calque.validation.layers import EagerStates, Gap, StateOf, from_eager, gaps_of, growing_states, valid_slots
from calque.validation.tolerance import tolerance

if TYPE_CHECKING:
    from calque.session import Session
    from calque.validation.reference import Reference
    from calque.validation.scenarios import Scenario


@dataclass(frozen=True)
class Stage:
    """The model after one step of its conversion: its name, what opens it, and its inputs and states, which a cache pass changes."""

    name: str
    open: Callable[[], Session]
    io: ModelIO


@dataclass(frozen=True)
class Divergence:
    """The first stage that fails, the layer and kind of its first wrong state (None: none is wrong), and how to say it."""

    stage: str
    layer: int | None
    kind: str | None
    text: str


def bisect(
    stages: Sequence[Stage], scenario: Scenario, references: Mapping[str, Reference], eager: EagerStates | None = None
) -> Divergence | None:
    """Return where the scenario first diverges, None if every stage passes it.

    ``stages`` are in pipeline order. States are compared with the eager model's for each row alone or, without ``eager``,
    with those of the stage before, if that one passed.
    """
    before: tuple[Session, ModelIO] | None = None
    for stage in stages:
        session = stage.open()
        row = compare(session, stage.io, scenario, references)
        if row["status"] == "failed":
            return _within(stage.name, session, stage.io, scenario, row, _expected(scenario, before, eager))
        before = session, stage.io
    return None


Expected = Callable[[Answer], StateOf]


def _expected(scenario: Scenario, before: tuple[Session, ModelIO] | None, eager: EagerStates | None) -> Expected | None:
    """Return what gives, for a call, the expected state of one row at its valid positions: [heads, positions, size]."""
    if eager is not None:
        return lambda answer: from_eager(eager, scenario, answer)
    if before is None:
        return None
    # Both are driven in step, so that only one call's outputs of each are held.
    session, io = before
    earlier = answers(session, io, scenario)
    specs = {state.output: state for state in io.states}

    def from_stage(answer: Answer) -> StateOf:
        same = next(earlier)
        return lambda spec, row: valid_slots(specs[spec.output], same, row)

    return from_stage


def _within(stage: str, session: Session, io: ModelIO, scenario: Scenario, failed: Row, expected: Expected | None) -> Divergence:
    """Return the first call's first layer whose state is wrong."""
    limit = tolerance(io.dtype).limit(io.layers)
    specs = growing_states(io)
    head = f"first diverges at stage '{stage}'"
    if scenario.refuse:
        return Divergence(stage, None, None, f"{head}: {failed['reason']}")
    if expected is None or not specs:
        return Divergence(stage, None, None, f"{head}: {failed['reason']}; there are no states to compare")
    try:
        for answer in answers(session, io, scenario):
            gaps = gaps_of(specs, answer, expected(answer))
            wrong = [gap for gap in gaps if not gap.sigma <= limit]
            if wrong:
                return _named(stage, f"{head}, ", gaps, wrong, answer.number)
    except (CalqueError, KeyError, ValueError) as error:
        what = error.what if isinstance(error, ParityFailed) else f"{type(error).__name__}: {error}"
        return Divergence(stage, None, None, f"{head}: {what}")
    last = specs[-1].layer
    text = f"{head}, after layer {last}'s attention (its MLP, final norm or head): {failed['reason']} (layers 0–{last} agree)"
    return Divergence(stage, None, None, text)


def _named(stage: str, head: str, gaps: Sequence[Gap], wrong: Sequence[Gap], call: int) -> Divergence:
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
