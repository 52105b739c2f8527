"""Artifacts beside each other: integers are compared whatever they lie like, answers where both were asked."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from calque.validation.across import apart, differing, integers_apart, not_finite

GENERATOR = np.random.default_rng(3)
Q = GENERATOR.integers(-8, 8, (12, 64)).astype(np.int8)
SCALE = GENERATOR.random((12, 2)).astype(np.float32)
Held = dict[str, tuple[NDArray[np.int8], NDArray[np.generic]]]


def held(*parts: tuple[NDArray[np.int8], NDArray[np.generic]]) -> Held:
    return {f"w{number}": part for number, part in enumerate(parts)}


@pytest.mark.parametrize(
    ("other", "apart_by", "scales"),
    [
        (held((Q[:5], SCALE[:5]), (Q[5:], SCALE[5:])), 0, "same"),  # in two matrices
        (held((Q, SCALE), (Q, SCALE)), 0, "same"),  # a tied one, twice
        (held((Q, np.repeat(SCALE, 2, 1))), 0, "same"),  # a scale for each half of a group
        (held((Q, SCALE.astype(np.float16))), 0, "same in float16"),
        (held((Q[:7], SCALE[:7])), 0, "same"),  # the rest is numbers there
        (held((Q, SCALE * 2)), 0, "different"),
        (held((Q[::-1].copy(), SCALE)), 0, "different"),  # scales of other rows
        (held((np.where(np.arange(12)[:, None] == 3, -Q, Q).astype(np.int8), SCALE)), 1, "different"),
    ],
)
def test_integers_are_the_same_or_it_is_said_how_many_are_not(other: Held, apart_by: int, scales: str) -> None:
    table = integers_apart({"none": {}, "one": held((Q, SCALE)), "other": other})
    assert [(row["artifact"], row["scales"]) for row in table[:2]] == [("none", "not read"), ("one", "same")]
    assert (table[2]["rows_apart"], table[2]["scales"]) == (apart_by, scales)
    lines = differing(table)
    assert bool(lines) == (apart_by > 0 or scales == "different")
    assert all("other" in line for line in lines)


def test_answers_are_compared_where_both_gave_one() -> None:
    one = {("s", "logits", 0, 0): np.array([1, 5], np.float32), ("s", "logits", 0, 1): np.array([1, 5], np.float32)}
    two = {("s", "logits", 0, 1): np.array([6, 5], np.float32), ("s", "logits", 0, 2): np.array([0, 0], np.float32)}
    [row] = apart({"one": one, "two": two}, {("s", "logits", 0): 2.0})
    assert (row["positions"], row["worst_sigma"], row["top1"]) == (1, 2.5, 0.0)
    place = ("s", "sentence_embedding", 0, 0)  # whose largest value is no answer
    [row] = apart({"one": {place: np.array([1, 5])}, "two": {place: np.array([2, 5])}}, {place[:3]: 1.0})
    assert (row["worst_sigma"], row["top1"]) == (1.0, None)
    nan = {("s", "logits", 0, 1): np.array([np.nan, 5], np.float32)}
    [row] = apart({"one": one, "nan": nan}, {("s", "logits", 0): 2.0})
    assert row["worst_sigma"] is None
    assert not_finite([row]) == ["one and nan: an answer is not finite"]
