"""The gate catches what a cache in slots can do wrong."""

from __future__ import annotations

import pytest

from tests.mutations.measure import LEAST_MARGIN
from tests.mutations.slots import broken, faults, slots_gate
from tests.mutations.traced_gate import MODELS, some_quick


@pytest.mark.parametrize("name", some_quick(*MODELS, "phi3", "gpt_oss", "bloom"))
def test_each_fault_of_a_cache_in_slots_is_caught(name: str, subtests: pytest.Subtests) -> None:
    gate = slots_gate(name)
    assert gate.first_failure(gate.session(gate.settled)) is None
    for fault in faults(gate.settled):
        with subtests.test(fault.__name__):
            row = gate.first_failure(gate.session(broken(fault, gate.settled)))
            assert row is not None
            assert row["worst_sigma"] >= LEAST_MARGIN * row["limit"], row["reason"]
