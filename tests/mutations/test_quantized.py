"""The gate catches what can be wrong with integers in the place of weights, activations being as they are."""

from __future__ import annotations

import pytest

from calque import passes
from tests.mutations.measure import LEAST_MARGIN
from tests.mutations.quantized import FAULTS, PLANS, broken, zero_points_ignored
from tests.quantized import Integers, calibrated, integers, planned
from tests.tiny_models import traced

MODELS = ("llama", pytest.param("qwen3", marks=pytest.mark.slow), pytest.param("gemma2", marks=pytest.mark.slow), "gpt2")


def caught(made: Integers, session: object) -> bool:
    row = made.failed(session)  # type: ignore[arg-type]
    return row is not None and (row["worst_sigma"] is None or row["worst_sigma"] >= LEAST_MARGIN * row["limit"])


@pytest.mark.parametrize("name", MODELS)
def test_each_fault_of_packed_integers_is_caught(name: str, subtests: pytest.Subtests) -> None:
    made = integers(name)
    assert made.failed(made.graph(made.model)) is None
    for fault in FAULTS:
        with subtests.test(fault.__name__):
            assert caught(made, made.graph(broken(fault, made.model)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_fault_of_8_bits_and_of_zero_points_is_caught(name: str, subtests: pytest.Subtests) -> None:
    made = integers(name, "int8", symmetric=False)
    assert made.failed(made.graph(made.model)) is None
    for fault in (*FAULTS, zero_points_ignored):
        if fault.__name__ == "nibbles_swapped":
            continue  # of 8 bits there are none
        with subtests.test(fault.__name__):
            assert caught(made, made.graph(broken(fault, made.model)))


@pytest.mark.parametrize("name", MODELS)
def test_each_other_way_to_quantize_is_caught(name: str, subtests: pytest.Subtests) -> None:
    made = integers(name)
    for fault, options in PLANS.items():
        with subtests.test(fault):
            other = traced(name)
            passes.run(planned(made.target, "int4", {"group": 16, **options}), other)
            assert caught(made, made.graph(other))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibration_that_is_ignored_is_caught(method: str) -> None:
    """The reference holds weights that were rounded by what products read of a text; the graph those rounded to nearest."""
    made = calibrated("llama", method)
    assert made.failed(made.graph(made.model)) is None
    other = traced("llama")
    passes.run(planned(made.target, "int4", {"group": 16}), other)
    assert caught(made, made.graph(other))
