"""Artifacts of one model held against each other: their integers bit for bit, their answers position by position.

Each artifact is proved against the eager model by itself. Side by side they show that every target got the same integers, so that
quality is a property of the model, and how far apart the runtimes are that multiply them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.validation.compare import RANKED
from calque.validation.drive import ModelIO, run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.session import Session
    from calque.validation.reference import Reference
    from calque.validation.scenarios import Scenario

    # q int8 [out, in] and scale [out, groups] by the name that a target's file has for them.
    Matrices = Mapping[str, tuple[NDArray[np.int8], NDArray[np.generic]]]
    Place = tuple[str, str, int, int]


@dataclass(frozen=True)
class Integers:
    """What an artifact holds of integers, whatever it calls them, joins them to, or how they lie: one entry an output of a product.

    ``rows``: digests of the integers; ``scaled`` and ``narrow``: of integers with their scales, as they are and in float16.
    """

    matrices: int
    dtype: str
    rows: frozenset[bytes]
    scaled: frozenset[bytes]
    narrow: frozenset[bytes]

    @classmethod
    def of(cls, matrices: Matrices) -> Integers:
        """Return the integers of matrices; a tied one that is stored twice counts once."""
        rows, scaled, narrow = set(), set(), set()
        dtypes = {scale.dtype.name for _, scale in matrices.values()}
        for q, scale in matrices.values():
            least = _fewest_groups(scale.astype(np.float32))
            halves = least.astype(np.float16)
            for row, wide, half in zip(q, least, halves, strict=True):
                digest = _digest(row)
                rows.add(digest)
                scaled.add(digest + _digest(wide))
                narrow.add(digest + _digest(half))
        return cls(len(matrices), ", ".join(sorted(dtypes)), frozenset(rows), frozenset(scaled), frozenset(narrow))

    def held_against(self, other: Integers) -> tuple[int, str]:
        """Return how many rows are not those of the other, and how the scales compare: same, same in float16, or different.

        One may hold fewer: a target that looks up no integers holds tables as numbers.
        """
        apart = min(len(self.rows - other.rows), len(other.rows - self.rows))
        if _one_in_other(self.scaled, other.scaled):
            return apart, "same"
        return apart, "same in float16" if _one_in_other(self.narrow, other.narrow) else "different"


# What is said of the scales of an artifact whose file does not give its integers back.
UNREAD = "not read"


def _one_in_other(one: frozenset[bytes], other: frozenset[bytes]) -> bool:
    return one <= other or other <= one


def _fewest_groups(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scales [out, groups] with neighbours that are the same joined: kernels want more groups than a matrix may have."""
    while scale.shape[1] > 1 and scale.shape[1] % 2 == 0 and np.array_equal(scale[:, 0::2], scale[:, 1::2]):
        scale = scale[:, 0::2]
    return scale


def _digest(values: NDArray[np.generic]) -> bytes:
    return blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()


def integers_apart(held: Mapping[str, Matrices]) -> list[dict[str, Any]]:
    """Return a row for each artifact, held against the first whose integers are known: matrices, rows, rows apart, scales."""
    found = {name: Integers.of(matrices) for name, matrices in held.items()}
    beside = next((name for name, integers in found.items() if integers.matrices), "")
    first = found.get(beside)
    table: list[dict[str, Any]] = []
    for name, integers in found.items():
        apart, scales = integers.held_against(first) if integers.matrices and first else (0, UNREAD)
        counted = {"matrices": integers.matrices, "rows": len(integers.rows), "scale_dtype": integers.dtype}
        table.append({"artifact": name, **counted, "beside": beside, "rows_apart": apart, "scales": scales})
    return table


def shared_scenarios(
    stored: Mapping[str, Iterable[tuple[Scenario, Mapping[str, Reference]]]],
) -> dict[str, tuple[Scenario, Mapping[str, Reference]]]:
    """Return the scenarios that every artifact was proved by with the same rows, none that it has to refuse, by name."""
    tables = [{scenario.name: (scenario, references) for scenario, references in pairs} for pairs in stored.values()]
    first, others = tables[0], tables[1:]
    return {
        name: (scenario, references)
        for name, (scenario, references) in first.items()
        if not scenario.refuse and all(name in other and _same(scenario, other[name][0]) for other in others)
    }


def _same(one: Scenario, other: Scenario) -> bool:
    return not other.refuse and one.rows == other.rows and one.prompts == other.prompts


def answers(session: Session, io: ModelIO, scenarios: Iterable[Scenario]) -> dict[Place, NDArray[np.float32]]:
    """Return what a session says at each scenario, output, row and position, the last time it is asked: float32 [size]."""
    found: dict[Place, NDArray[np.float32]] = {}
    for scenario in scenarios:
        for reached in run(session, io, scenario):
            for position, values in zip(reached.positions.tolist(), reached.values, strict=True):
                found[scenario.name, reached.output, reached.row, position] = values.astype(np.float32)
    return found


def apart(said: Mapping[str, Mapping[Place, NDArray[np.float32]]], sigmas: Mapping[tuple[str, str, int], float]) -> list[dict[str, Any]]:
    """Return a row for each two artifacts: positions that both answered, worst |Δ| in σ of the output, share of the same best logit."""
    table = []
    for one, other in combinations(said, 2):
        shared = [place for place in said[one] if place in said[other]]
        ranked = sum(place[1] == RANKED for place in shared)
        worst, agreed = 0.0, 0
        for place in shared:
            left, right = said[one][place], said[other][place]
            # Not max(): a NaN must show, and compares with nothing.
            delta = float(np.abs(left - right).max()) / (sigmas[place[:3]] or 1.0)
            worst = delta if np.isnan(delta) or np.isnan(worst) or delta > worst else worst
            agreed += int(place[1] == RANKED and left.argmax() == right.argmax())
        row = {"artifacts": [one, other], "positions": len(shared)}
        finite = worst if np.isfinite(worst) else None
        table.append({**row, "worst_sigma": finite, "top1": agreed / ranked if ranked else None})
    return table


def sigmas_of(shared: Mapping[str, tuple[Scenario, Mapping[str, Reference]]]) -> dict[tuple[str, str, int], float]:
    """Return the standard deviation of each row of each output in each scenario."""
    return {
        (name, output, row): sigma
        for name, (_, references) in shared.items()
        for output, reference in references.items()
        for row, sigma in enumerate(reference.sigmas)
    }


def not_finite(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each two artifacts between which a difference is no number."""
    pairs = dict.fromkeys(tuple(row["artifacts"]) for row in answers if row["positions"] and row["worst_sigma"] is None)
    return [f"{one} and {other}: an answer is not finite" for one, other in pairs]


def differing(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each artifact whose integers are not those that they were held against."""
    return [
        f"{row['artifact']}: {row['rows_apart']} of {row['rows']} rows are not those of {row['beside']}, scales are {row['scales']}"
        for row in table
        if row["rows_apart"] or row["scales"] == "different"
    ]
