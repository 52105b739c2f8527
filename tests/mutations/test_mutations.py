"""The parity gate catches what a converter can get wrong: every fault of the table, on every model that can have it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from calque import passes
from calque.passes.transpose_linear import TransposeLinear
from calque.session import Session
from calque.traced import TracedModel
from calque.validation.bisect import Divergence, Stage, bisect
from calque.validation.eager import eager_states
from tests.mutations import measure, onnx_mutations
from tests.mutations.attention_mutations import learned_position_off_by_one
from tests.mutations.model_mutations import change_weight, largest_element_perturbed, rolled_by_one, weight_named
from tests.mutations.mutations import LONGROPE, MUTATIONS, Mutation, applicable
from tests.mutations.traced_gate import MODELS, TracedGate, traced_gate

# torch warns of its own tree specs when TracedModel.copy copies a program deeply.

# What is added to all keys alike shifts every score of a query by the same number, and softmax takes it out again.
WITHOUT_EFFECT = {f"transformer.h.{layer}.attn.c_attn.bias" for layer in (0, 1)}


# Every mutation that gemma3_text can have is met on another of them too.
GATES = [pytest.param(name, marks=pytest.mark.slow if name == "gemma3_text" else ()) for name in MODELS]


@pytest.fixture(scope="module", params=GATES)
def gate(request: pytest.FixtureRequest) -> TracedGate:
    return traced_gate(request.param)


def require_caught(gate: TracedGate, name: str, found: measure.Finding) -> None:
    margin = found.margin(measure.limit_of(gate))
    print(f"{gate.name:12} {name:32} {found!s:32} {margin:10.0f} × the limit")
    assert found.scenario, f"{gate.name} passes every scenario with the fault: {name}"
    assert found.sigma is not None or found.is_shape, f"{name} crashes {gate.name}, which proves nothing: {found.reason}"
    assert margin >= measure.LEAST_MARGIN, f"{name} is only just caught on {gate.name}: {found.reason}"


def check(gate: TracedGate, mutation: Mutation) -> None:
    found = measure.find(gate, mutation)
    require_caught(gate, mutation.name, found)
    assert found.seen_by_one_forward == (not mutation.takes), f"one forward of one prompt tells otherwise: {mutation.name}"


def test_every_scenario_passes_without_a_mutation(gate: TracedGate) -> None:
    assert gate.first_failure(gate.session(gate.settled)) is None


def test_each_mutation_is_caught_and_by_one_forward_only_where_it_says_so(gate: TracedGate, subtests: pytest.Subtests) -> None:
    assert len(applicable(gate.name)) >= 15
    for mutation in applicable(gate.name):
        with subtests.test(mutation.name):
            check(gate, mutation)


def test_one_element_of_any_weight_one_percent_off_is_caught(gate: TracedGate, subtests: pytest.Subtests) -> None:
    for name in gate.settled.weights.entries:
        with subtests.test(name):
            model = gate.settled.copy()
            change_weight(model, name, largest_element_perturbed)
            row = gate.one_forward(gate.session(model))
            assert (row["status"] == "passed") == (name in WITHOUT_EFFECT), row["reason"]


def test_each_fault_of_the_emitted_file_is_caught(gate: TracedGate, subtests: pytest.Subtests) -> None:
    assert gate.first_failure(onnx_mutations.opened(onnx_mutations.artifact(gate.name))) is None
    for edit in onnx_mutations.EDITS:
        with subtests.test(edit.__name__):
            require_caught(gate, edit.__name__, measure.find_in_file(gate, edit))


def test_longrope_mutations_are_caught_on_phi3(subtests: pytest.Subtests) -> None:
    gate = traced_gate("phi3")
    assert gate.first_failure(gate.session(gate.settled)) is None
    for mutation in LONGROPE:
        with subtests.test(mutation.name):
            check(gate, mutation)


def test_a_rotation_common_to_queries_and_keys_passes() -> None:
    gate = traced_gate("llama")
    assert gate.first_failure(gate.session(Mutation(learned_position_off_by_one).broken(gate.settled))) is None


def first_divergence(gate: TracedGate, planted: TracedModel, artifact: Callable[[], Session]) -> Divergence:
    stages = (
        Stage("trace", lambda: gate.session(gate.traced), gate.io),
        Stage("cache_dynamic", lambda: gate.session(gate.settled), gate.io),
        Stage("transpose_linear", lambda: gate.session(planted), gate.io),
        Stage("onnxruntime", artifact, gate.io),
    )
    [scenario] = (scenario for scenario in gate.scenarios if scenario.name == "ragged-left")
    found = bisect(stages, scenario, gate.references[scenario.name], partial(eager_states, gate.source.load_eager()))
    assert found is not None
    return found


def transposed(gate: TracedGate) -> TracedModel:
    model = gate.settled.copy()
    passes.run([TransposeLinear()], model)
    return model


def test_a_fault_planted_in_a_pass_is_found_in_its_stage_and_layer() -> None:
    gate = traced_gate("gemma3_text")
    planted = transposed(gate)
    change_weight(planted, weight_named(planted, "layers.1.self_attn.v_proj.weight.transposed"), rolled_by_one)
    found = first_divergence(gate, planted, lambda: gate.session(planted))
    assert (found.stage, found.layer, found.kind) == ("transpose_linear", 1, "value")


def test_a_fault_planted_in_the_artifact_is_found_there_and_in_its_layer() -> None:
    gate = traced_gate("gemma3_text")
    broken = onnx_mutations.broken(onnx_mutations.artifact(gate.name), onnx_mutations.keys_turned)
    found = first_divergence(gate, transposed(gate), lambda: onnx_mutations.opened(broken))
    assert (found.stage, found.layer, found.kind) == ("onnxruntime", 2, "key")


def test_the_page_lists_every_mutation() -> None:
    page = measure.PAGE.read_text(encoding="utf-8")
    missing = [
        mutation.name for mutation in (*MUTATIONS, *LONGROPE) if f"| {mutation.name} | {mutation.says} | {mutation.takes} |" not in page
    ]
    missing += [edit.__name__ for edit in onnx_mutations.EDITS if f"| {edit.__name__.replace('_', ' ')} | " not in page]
    assert missing == [], "write it anew: python -m tests.mutations.measure"
