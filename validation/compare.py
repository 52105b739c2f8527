"""One scenario run and compared with its reference, in σ of each output, on valid positions only."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.errors import CalqueError, ParityFailed, TargetUnavailable, Unsupported
from calque.validation.drive import ModelIO, Reached, run
from calque.validation.rounding import FACTOR
from calque.validation.tolerance import tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.session import Session
    from calque.validation.reference import Reference
    from calque.validation.scenarios import Scenario

Row = dict[str, Any]

# The output whose largest value is an answer: the likeliest token or label.
RANKED = "logits"
# Positions compared at a time: the difference of one piece is held in float32 beside the logits themselves.
STEP = 64
# How the reason begins where the session gave no answer at all.
SESSION_FAILED = "the session failed"
# The row of the table of limits for mixtures of experts, whose tokens rounding sends elsewhere.
EXPERTS = "int8 with experts"
# And how far they may be in the mean, in σ: a tenth was measured, an answer that has nothing to do with the model is 0.8 and more.
MEAN_OF_EXPERTS = 0.4
# How the name of a row ends whose session rounds no activations, where the artifact itself does.
EXACT = ", activations exact"


@dataclass
class Comparison:
    """The differences met so far. ``worst`` and ``mean`` are in σ; ``faults`` are lines, first position first."""

    scenario: Scenario
    references: Mapping[str, Reference]
    limit: float
    noise: float
    positions: int = 0
    ranked: int = 0
    worst: float = 0.0
    total: float = 0.0
    elements: int = 0
    agreed: int = 0
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, reached: Reached) -> None:
        """Count one row's positions of one call."""
        for start in range(0, len(reached.positions), STEP):
            part = slice(start, start + STEP)
            self._add(reached, reached.positions[part], np.asarray(reached.values[part]))

    def _add(self, reached: Reached, positions: NDArray[np.int64], values: NDArray[np.generic]) -> None:
        reference = self.references[reached.output]
        expected = reference.tables[reached.row, reached.beyond].at(positions)
        columns = reference.columns
        got = values.astype(np.float32, copy=False)
        chosen = got if columns is None else got[:, columns[columns < got.shape[1]]]
        if chosen.shape != expected.values.shape:
            wanted = expected.values.shape[1] if columns is None else f"more than {columns[-1]}"
            raise ParityFailed(f"{reached.output} has {got.shape[1]} values a position, the eager model's has {wanted}")
        self.positions += len(positions)
        finite = np.isfinite(got).all(axis=1)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            self.worst = math.inf
            self.faults.append(f"{_where(reached, int(positions[bad]), self.scenario)}: NaN or infinity")
            return
        sigma = reference.sigmas[reached.row]
        delta = np.abs(chosen - expected.values) / np.float32(sigma)
        self.total += float(delta.sum(dtype=np.float64))
        self.elements += delta.size
        of_position = delta.max(axis=1)
        self.worst = max(self.worst, float(of_position.max()))
        for at in np.flatnonzero(of_position > self.limit)[:1]:
            where = _where(reached, int(positions[at]), self.scenario)
            self.faults.append(f"{where}: {of_position[at]:.1e} σ, limit {self.limit:.1e} σ")
        if reached.output == RANKED:
            self._tokens(reached, positions, got.argmax(axis=1) == expected.top, expected.margin / sigma)

    def _tokens(self, reached: Reached, positions: NDArray[np.int64], same: NDArray[np.bool_], margin: NDArray[np.float32]) -> None:
        self.ranked += len(same)
        self.agreed += int(same.sum())
        for at in np.flatnonzero(~same):
            # Each of the two leading logits may have moved by the noise.
            if margin[at] < 2 * self.noise:
                self.near_ties.append({"row": reached.row, "position": int(positions[at]), "margin_sigma": float(margin[at])})
            else:
                where = _where(reached, int(positions[at]), self.scenario)
                self.faults.append(f"{where}: another likeliest token, though the reference's leads by {margin[at]:.1e} σ")


def _where(reached: Reached, position: int, scenario: Scenario) -> str:
    step = reached.call - max(1, len(scenario.chunks))
    at = f"decode step {step + 1}" if step >= 0 else "prefill"
    return f"row {reached.row}, position {position} ({at if reached.output == RANKED else reached.output})"


def bounds(io: ModelIO, references: Mapping[str, Reference] | None) -> tuple[float, float]:
    """Return how far honest values may lie from the references, in σ, and from where on they have failed."""
    row = tolerance(io.dtype)
    noise, limit = row.noise(io.layers), row.limit(io.layers)
    if not io.rounded or not references:
        return noise, limit
    rounding = max(reference.rounding for reference in references.values())
    if io.routed:
        rounding = max(rounding, tolerance(EXPERTS).noise(io.layers))
    return max(noise, rounding), max(limit, FACTOR * rounding)


def _far_in_the_mean(met: Comparison, limit: float) -> list[str]:
    mean = met.total / max(met.elements, 1)
    return [f"values are {mean:.1e} σ off in the mean, limit {limit:.1e} σ"] if mean > limit else []


def mean_limit(io: ModelIO, references: Mapping[str, Reference]) -> float:
    """Return the mean difference, in σ, from which on rounded activations do not explain it, nor honest noise where none are rounded."""
    rounding = FACTOR * max(reference.mean_rounding for reference in references.values())
    return max(rounding, MEAN_OF_EXPERTS if io.routed else tolerance(io.dtype).limit(io.layers))


def compare(session: Session, io: ModelIO, scenario: Scenario, references: Mapping[str, Reference] | None) -> Row:
    """Return how the session did: ``status`` passed, failed or not_run, with the figures and the first fault as reason.

    ``references``: what is expected of each output.

    Nothing that the session raises gets out: a crash is a failure with its text as the reason.

    Raises:
        TargetUnavailable: the session's runtime is not here after all.
    """
    noise, limit = bounds(io, references)
    begun = time.perf_counter()
    if scenario.not_run:
        return _result(scenario, None, "not_run", scenario.not_run, 0.0, limit)
    if scenario.refuse:
        status, said = _refused(session, io, scenario)
        return _result(scenario, None, status, said, time.perf_counter() - begun, limit)
    if references is None:
        raise ValueError(f"scenario {scenario.name} has no reference")
    met = Comparison(scenario, references, limit, noise)
    try:
        for reached in run(session, io, scenario):
            met.add(reached)
    except TargetUnavailable:
        raise
    except ParityFailed as error:
        met.faults.append(error.what)
    except CalqueError as error:
        met.faults.append(f"{SESSION_FAILED}: {error}".replace("\n", " "))
    except Exception as error:  # a session is foreign code; its crash is a finding, not our end
        met.faults.append(f"{SESSION_FAILED}: {type(error).__name__}: {error}".replace("\n", " "))
    if not met.positions and not met.faults:
        met.faults.append("no valid position was reached")
    met.faults += [] if met.faults or not io.rounded else _far_in_the_mean(met, mean_limit(io, references))
    reason = met.faults[0] if met.faults else None
    return _result(scenario, met, "failed" if met.faults else "passed", reason, time.perf_counter() - begun, met.limit)


def _refused(session: Session, io: ModelIO, scenario: Scenario) -> tuple[str, str]:
    try:
        for _ in run(session, io, scenario):
            pass
    except Unsupported as error:
        return "passed", f"refused: {error.what}"
    except Exception as error:  # any other error is not the refusal that was promised
        return "failed", f"must be refused ({scenario.refuse}) with Unsupported, raised {type(error).__name__}: {error}".replace("\n", " ")
    return "failed", f"must be refused ({scenario.refuse}), was answered"


def _result(scenario: Scenario, met: Comparison | None, status: str, reason: str | None, seconds: float, limit: float) -> Row:
    counted = met is not None and met.elements > 0
    return {
        "name": scenario.name,
        "rows": len(scenario.prompts),
        "positions": met.positions if met else 0,
        # JSON has no infinity: a row with NaN has no figure, its reason says so.
        "worst_sigma": met.worst if met and counted and math.isfinite(met.worst) else None,
        "mean_sigma": met.total / met.elements if met and counted else None,
        "limit": limit,
        "top1_agree": met.agreed / met.ranked if met and met.ranked else None,
        "near_ties": met.near_ties if met else [],
        "status": status,
        "reason": reason,
        "seconds": round(seconds, 4),
    }
