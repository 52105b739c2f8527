"""With every operator joined the gate still catches every mutation, and every fault that joining itself can make."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mutations.fused import ALWAYS_READ, FAULTS, NEVER_READ, OF_THE_MASK, first_failure, fused, healed
from tests.mutations.measure import LEAST_MARGIN
from tests.mutations.mutations import LACKING, MUTATIONS, applicable
from tests.mutations.traced_gate import MODELS, some_quick, traced_gate

# Padding none is padding right of which no row has any. Of the mutations the padding that is the default is quick, of faults both.
PADDINGS = ("any", "right")
MUTATED = ("any", pytest.param("right", marks=pytest.mark.slow))


@pytest.mark.parametrize("padding", MUTATED)
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in (*MODELS, "phi3", *LACKING) if n != "llama")])
def test_each_mutation_is_caught_though_every_operator_is_joined(name: str, padding: str, subtests: pytest.Subtests) -> None:
    gate = traced_gate(name)
    for mutation in applicable(name):
        with subtests.test(mutation.name):
            model = fused(mutation.broken(gate.settled), padding)
            row = first_failure(gate, model)
            if healed(mutation.name, model, padding):
                assert row is None, row
                continue
            assert row is not None
            assert " has shape " in row["reason"] or row["worst_sigma"] >= LEAST_MARGIN * row["limit"], row["reason"]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", some_quick(*MODELS, "phi3", "gpt_oss", "llama-16"))
def test_each_fault_of_a_joined_operator_is_caught(name: str, padding: Any, subtests: pytest.Subtests) -> None:
    gate = traced_gate(name)
    whole = fused(gate.settled.copy(), padding)
    assert first_failure(gate, whole) is None
    caught = []
    for fault, break_it in FAULTS.items():
        model = whole.copy()
        if not break_it(model):
            continue
        with subtests.test(fault):
            row = first_failure(gate, model)
            assert row is not None
            assert row["worst_sigma"] >= LEAST_MARGIN * row["limit"], row["reason"]
            caught.append(fault)
    assert "scale of another head size" in caught


def test_what_a_model_lacks_are_names_of_mutations() -> None:
    names = {mutation.name for mutation in MUTATIONS}
    assert all(lacking < names for lacking in LACKING.values())


def test_faults_of_the_mask_are_names_of_mutations() -> None:
    assert {mutation.name for mutation in MUTATIONS} >= OF_THE_MASK >= ALWAYS_READ | NEVER_READ


def test_each_fault_of_a_joined_operator_meets_a_model_that_has_it() -> None:
    met = set()
    for name in ("gemma2", "gpt_oss", "llama-16"):
        for padding in PADDINGS:
            whole = fused(traced_gate(name).settled.copy(), padding)
            met |= {fault for fault, break_it in FAULTS.items() if break_it(whole.copy())}
    assert met == FAULTS.keys()
