from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calque.artifact import Limits
from calque.errors import Unsupported, UsageError
from calque.runtime.limits import check_limits

SLOTS = Limits(padding="right", max_length=8)


def call(first: list[int], last: list[int], width: int, positions: list[list[int]] | None = None) -> dict[str, Any]:
    write = np.array(first, np.int64)
    told = write[:, None] + np.arange(width) if positions is None else np.array(positions)
    ids = np.ones((len(first), width), np.int64)
    return {"input_ids": ids, "position_ids": told, "write_indices": write, "kv_lengths": np.array(last, np.int32)}


ALLOWED: list[tuple[Limits, dict[str, Any]]] = [
    (SLOTS, call([0, 0], [8, 1], 8)),
    (SLOTS, call([7, 3], [8, 4], 1)),
    (SLOTS, call([4, 3], [6, 3], 2)),  # row 1 gets padding alone
    (SLOTS, call([0], [2], 3, [[0, 1, 1]])),  # what padding is told is its own business
    (Limits(padding="none", max_length=8), call([2, 5], [4, 7], 2)),
    (Limits(padding="right", recompute_at=4), call([5], [6], 1)),
    (Limits(padding="right", recompute_at=4), call([0], [6], 6)),
]


@pytest.mark.parametrize(("limits", "inputs"), ALLOWED)
def test_rows_that_fill_their_slots_in_order_are_let_through(limits: Limits, inputs: dict[str, Any]) -> None:
    check_limits(limits, inputs)


REFUSED: list[tuple[Limits, dict[str, Any], str]] = [
    (SLOTS, call([8], [9], 1), "ends past the slots: the artifact's max_length is 8"),
    (SLOTS, call([0, 7], [2, 8], 2), "ends past the slots: the artifact's max_length is 8"),  # padding alone, but it is written
    (SLOTS, call([0], [9], 9), "ends past the slots: the artifact's max_length is 8"),
    (SLOTS, call([0, 0], [3, 1], 3, [[0, 1, 2], [1, 1, 1]]), "fill its slots from 0"),
    (SLOTS, call([0, 0], [4, 2], 4, [[0, 1, 2, 3], [0, 0, 0, 1]]), "fill its slots from 0"),  # padded before
    (SLOTS, call([3], [4], 1, [[2]]), "fill its slots from 0"),
    (Limits(padding="none", max_length=8), call([0, 0], [3, 2], 3), "no padding"),
    (Limits(padding="right", recompute_at=4), call([4], [5], 1), "past 4"),
    (Limits(padding="right", batched_chunk=False), call([4, 4], [6, 6], 2), "2 tokens of 2 rows at once"),
]


@pytest.mark.parametrize(("limits", "inputs", "what"), REFUSED)
def test_what_slots_cannot_hold_is_refused(limits: Limits, inputs: dict[str, Any], what: str) -> None:
    with pytest.raises(Unsupported, match=what) as caught:
        check_limits(limits, inputs)
    assert caught.value.fix


@pytest.mark.parametrize("inputs", [call([2], [6], 3), call([2], [1], 3), call([-1], [1], 2)])
def test_lengths_that_no_call_leads_to_are_a_usage_error_naming_the_row(inputs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="kv_lengths") as caught:
        check_limits(SLOTS, inputs)
    assert caught.value.where[0].startswith("row 0: write_indices")
