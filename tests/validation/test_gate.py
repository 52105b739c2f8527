"""The gate passes what is right and catches what is not, on real architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from calque.artifact import DECODE, PREFILL, Check, round_up
from calque.errors import ArtifactUnreadable, ParityFailed
from calque.validation.compare import compare
from calque.validation.drive import ModelIO
from calque.validation.prove import prove, routed_hint, routed_note
from tests.eager_session import EagerSession
from tests.tiny_models import TINY
from tests.validation.gate import Broken, gate

SHARED = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mixtral"]
Run = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize("name", TINY)
def test_the_gate_passes_an_honest_session(name: str) -> None:
    made = gate(name)
    seen: list[str] = []
    proof, rows = prove(made.artifact, made.session(), made.scenarios, made.references, lambda row: seen.append(row["name"]))
    assert proof.failures == ()
    assert proof.numerics.status == proof.build.status == proof.execution.status == "passed"
    assert proof.numerics.by == "eager"
    assert proof.numerics.worst is not None
    assert proof.numerics.worst <= 2e-5
    assert [row["name"] for row in rows] == seen == [scenario.name for scenario in made.scenarios]
    assert all(row["top1_agree"] == 1.0 for row in rows if row["positions"])
    proof.raise_if_failed()


def decode_positions_off_by_one(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    past = inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]
    return run({**inputs, "position_ids": inputs["position_ids"] + (1 if past else 0)})


def positions_by_column(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    batch, new = inputs["input_ids"].shape
    total = inputs["attention_mask"].shape[1]
    # As an operator does that counts slots while the mask counts tokens: wrong on padded rows, from the first step.
    columns = np.broadcast_to(np.arange(total - new, total), (batch, new))
    return run({**inputs, "position_ids": columns if total > new else inputs["position_ids"]})


def padding_ignored(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    return run({**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])})


def swapped(outputs: dict[str, Any], swap: Callable[[str], str]) -> dict[str, Any]:
    return {swap(name): array for name, array in outputs.items()}


def keys_and_values_swapped(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    names = {"key": "value", "value": "key"}
    return swapped(run(inputs), lambda n: n if n == "logits" else f"{n.rpartition('.')[0]}.{names[n.rpartition('.')[2]]}")


def cache_of_another_layer(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    names = {"0": "1", "1": "0"}
    return swapped(run(inputs), lambda n: n if n == "logits" else ".".join(names.get(part, part) for part in n.split(".")))


def present_before_update(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    past = {name.replace("past_key_values", "present"): array for name, array in inputs.items() if name.startswith("past")}
    return {**run(inputs), **past}


def newest_slot_empty(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    outputs = {name: array.copy() for name, array in run(inputs).items()}
    for name, array in outputs.items():
        if name != "logits":
            array[:, :, -1] = 0
    return outputs


def nan_in_padded_slots(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    outputs = {name: array.copy() for name, array in run(inputs).items()}
    rows, slots = np.nonzero(inputs["attention_mask"] == 0)
    for name, array in outputs.items():
        if name != "logits":
            array[rows, :, slots] = np.nan
    return outputs


def first_heads_repeated(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    outputs = {name: array.copy() for name, array in run(inputs).items()}
    outputs["present.1.value"][:, 1] = outputs["present.1.value"][:, 0]
    return outputs


def rows_swapped(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
    outputs = run(inputs)
    return {**outputs, "logits": outputs["logits"][::-1]}


BREAKAGES = [
    decode_positions_off_by_one,
    positions_by_column,
    padding_ignored,
    keys_and_values_swapped,
    cache_of_another_layer,
    present_before_update,
    newest_slot_empty,
    nan_in_padded_slots,
    first_heads_repeated,
    rows_swapped,
]


@pytest.mark.parametrize("change", BREAKAGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", SHARED)
def test_the_gate_catches(name: str, change: Any) -> None:
    made = gate(name)
    picked = made.pick("ragged-left", "ragged-right", "batch-2")
    proof, _ = prove(made.artifact, Broken(made.session(), change), picked, made.references)
    assert proof.numerics.status == "failed"
    with pytest.raises(ParityFailed, match="numerics failed"):
        proof.raise_if_failed()


@pytest.mark.parametrize("name", SHARED)
def test_the_gate_catches_one_weight_off_by_one_percent(name: str) -> None:
    made = gate(name)
    for part in ("down_proj", "o_proj", "c_proj", "v_proj", "up_proj", "c_fc"):
        matrices = [key for key, tensor in made.model.named_parameters() if part in key and tensor.ndim > 1]
        for key in matrices[:1]:
            model = copy.deepcopy(made.model)
            with torch.no_grad():
                flat = model.get_parameter(key).view(-1)
                flat[flat.abs().argmax()] *= 1.01
            session = EagerSession(model, made.limits)
            proof, rows = prove(made.artifact, session, made.pick("ragged-left", "untraced-length"), made.references)
            assert proof.numerics.status == "failed", (key, [row["worst_sigma"] for row in rows])


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("error", [-1, 1])
def test_the_gate_catches_a_window_off_by_one(name: str, error: int) -> None:
    made = gate(name)
    session = EagerSession(made.model, made.limits, window_error=error)
    picked = made.pick("past-window-8-left", "past-window-8-right", "untraced-length", "length-1")
    proof, rows = prove(made.artifact, session, picked, made.references)
    failed = {row["name"] for row in rows if row["status"] == "failed"}
    assert {"past-window-8-left", "past-window-8-right", "untraced-length"} <= failed
    assert "length-1" not in failed
    assert proof.failures[0].startswith("untraced-length: row 0, position ")


def test_nan_in_the_logits_of_padding_is_no_fault() -> None:
    def change(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
        logits = run(inputs)
        new = inputs["input_ids"].shape[1]
        padded = inputs["attention_mask"][:, -new:] == 0
        return {**logits, "logits": np.where(padded[:, :, None], np.nan, logits["logits"])}

    made = gate("llama")
    picked = made.pick("ragged-left", "ragged-right", "chunked-prefill-left")
    proof, _ = prove(made.artifact, Broken(made.session(), change), picked, made.references)
    assert proof.numerics.status == "passed"


def test_a_cache_continued_past_the_longrope_threshold_must_be_refused() -> None:
    made = gate("phi3")
    lax = EagerSession(made.model)  # enforces no limit, and batches rows as eager does
    crossing = made.pick("continued-past-16", "across-16-left", "across-16-right")
    rows = prove(made.artifact, lax, crossing, made.references)[1]
    failed = {row["name"]: row["reason"] for row in rows if row["status"] == "failed"}
    assert failed["continued-past-16"] == "must be refused (recompute_at: 16), was answered"
    # One row beyond the threshold changes the frequencies of the whole batch in eager: the short rows are wrong.
    assert {"across-16-left", "across-16-right"} <= set(failed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda outputs: {k: v for k, v in outputs.items() if k != "logits"}, "output logits is missing"),
        (lambda outputs: {k: v for k, v in outputs.items() if k != "present.1.key"}, "output present.1.key is missing"),
        (lambda outputs: {**outputs, "logits": outputs["logits"][..., :-1]}, "logits has 210 values a position"),
        (lambda outputs: {**outputs, "logits": outputs["logits"][:, :3]}, "logits has shape [1, 3, 211]"),
        (lambda outputs: {**outputs, "logits": outputs["logits"] * np.nan}, "NaN or infinity"),
        (lambda outputs: {**outputs, "logits": outputs["logits"] + np.inf}, "NaN or infinity"),
    ],
)
def test_a_malformed_output_fails_with_its_reason(change: Any, reason: str) -> None:
    made = gate("llama")
    [row] = prove(made.artifact, Broken(made.session(), lambda i, run: change(run(i))), made.pick("single-prompt"), made.references)[1]
    assert row["status"] == "failed"
    assert reason in row["reason"]


def test_a_session_that_crashes_fails_build_and_not_the_gate_itself() -> None:
    def crash(_inputs: dict[str, Any], _run: Run) -> dict[str, Any]:
        raise ArtifactUnreadable("onnxruntime refuses model.onnx")

    made = gate("llama")
    proof, rows = prove(made.artifact, Broken(made.session(), crash), made.scenarios, made.references)
    assert proof.build.status == "failed"
    assert proof.execution.status == "not_run"
    assert all("onnxruntime refuses model.onnx" in row["reason"] for row in rows)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_graphs_that_keep_the_last_logits_pass_and_their_faults_are_seen(name: str) -> None:
    made = gate(name)
    for artifact, session in (
        (made.artifact, EagerSession(made.model, made.limits, logits="last")),
        (_asking(made), EagerSession(made.model, made.limits)),
    ):
        names = ("ragged-left", "ragged-right", "chunked-prefill", "chunked-prefill-left", "batch-2", "across-16", "across-16-right")
        proof, rows = prove(artifact, session, made.pick(*names), made.references)
        assert proof.failures == ()
        assert all(row["positions"] >= row["rows"] * 3 for row in rows)
        broken = prove(artifact, Broken(session, newest_slot_empty), made.pick("ragged-left"), made.references)[0]
        assert broken.numerics.status == "failed"


def _asking(made: Any) -> Any:
    from tests.eager_session import artifact_of

    return artifact_of(made.model, made.limits, made.folder, keep_input=True)


def test_a_graph_that_ignores_how_many_logits_were_asked_for_fails() -> None:
    def ignore(inputs: dict[str, Any], run: Run) -> dict[str, Any]:
        return run({**inputs, "num_logits_to_keep": np.array(0)})

    made = gate("llama")
    [row] = prove(_asking(made), Broken(made.session(), ignore), made.pick("chunked-prefill"), made.references)[1]
    # The second piece is one token long, the third is asked for its last position alone.
    assert row["status"] == "passed" or "logits has shape" in row["reason"]
    [row] = prove(_asking(made), Broken(made.session(), ignore), made.pick("chunked-prefill-batch"), made.references)[1]
    assert "logits has shape [2, 5, 211], [2, 1, vocabulary] expected" in row["reason"]


def test_another_token_is_allowed_at_a_near_tie_alone() -> None:
    made = gate("llama")
    [scenario] = made.pick("single-prompt")
    reference = made.references["single-prompt"]["logits"]
    table = reference.tables[0, False]
    io = ModelIO.of(made.artifact)
    second = np.argsort(table.values, axis=1)[:, -2]
    tied = copy.copy(table)
    for margin, status in ((1e-9, "passed"), (1.0, "failed")):
        object.__setattr__(tied, "top", np.where(np.arange(len(second)) == 4, second, table.top))
        object.__setattr__(tied, "margin", np.full(len(second), margin, np.float32))
        other = copy.copy(reference)
        object.__setattr__(other, "tables", {(0, False): tied})
        row = compare(made.session(), io, scenario, {"logits": other})
        assert row["status"] == status, row["reason"]
        assert [tie["position"] for tie in row["near_ties"]] == ([4] if status == "passed" else [])
        assert row["top1_agree"] == pytest.approx(14 / 15)


def test_a_scenario_left_out_is_said_in_the_proof() -> None:
    from dataclasses import replace

    made = gate("llama")
    left_out = replace(made.scenarios[1], not_run="too long", rows=())
    proof, rows = prove(made.artifact, made.session(), [made.scenarios[0], left_out], made.references)
    assert proof.numerics.status == "passed"
    assert proof.numerics.reason == "ragged-left not run: too long"
    assert rows[1]["status"] == "not_run"
    assert prove(made.artifact, made.session(), [left_out], made.references)[0].numerics == Check("not_run", "eager", proof.numerics.reason)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.0, 1e-9),
        (1.0e-6, 1e-6),
        (1.01e-6, 2e-6),
        (2e-6, 2e-6),
        (2.0001e-6, 5e-6),
        (4.9e-6, 5e-6),
        (5.1e-6, 1e-5),
        (0.7, 1.0),
        (31.0, 50.0),
    ],
)
def test_round_up_goes_to_one_two_or_five(value: float, rounded: float) -> None:
    assert round_up(value) == rounded


def test_only_a_mixture_that_rounds_activations_is_said_to_be_held_to_a_wide_limit() -> None:
    dense = gate("llama").artifact
    rounded = replace(dense, precision="int4", passes={"quantize_weights": 14})
    assert "gross faults" in routed_note(replace(rounded, passes={"quantize_weights": 14, "fuse_experts": 2}))
    assert routed_note(rounded) == routed_note(replace(dense, passes={"fuse_experts": 2})) == ""


def test_a_mixture_in_a_narrow_type_is_told_why_it_may_fail() -> None:
    dense = gate("llama").artifact
    mixture = replace(dense, passes={"fuse_experts": 2})
    assert [routed_hint(ModelIO.of(artifact)) for artifact in (dense, mixture, replace(dense, precision="bf16"))] == [[], [], []]
    narrow = replace(mixture, precision="bf16", states=tuple(replace(state, dtype="bfloat16") for state in dense.states))
    [hint] = routed_hint(ModelIO.of(narrow))
    assert hint.startswith("in bfloat16 a token near a tie goes to another expert")


def test_steps_are_driven_through_the_graph_for_steps_and_judged_there() -> None:
    made = gate("llama")
    [graph] = made.artifact.graphs.values()
    artifact = replace(made.artifact, graphs={PREFILL: graph, DECODE: graph})
    session, called = made.session(), set[tuple[str, bool]]()

    def honest(graph: str, inputs: Any) -> Any:
        called.add((graph, inputs["input_ids"].shape[1] == 1))
        return session("model", inputs)

    def forgetful(graph: str, inputs: Any) -> Any:
        outputs = honest(graph, inputs)
        return newest_slot_empty(inputs, lambda _: outputs) if graph == DECODE else outputs

    picked = made.pick("single", "batch-2", "chunked-prefill")
    assert prove(artifact, honest, picked, made.references)[0].numerics.status == "passed"
    assert called == {(PREFILL, False), (DECODE, True)}
    assert prove(artifact, forgetful, picked, made.references)[0].numerics.status == "failed"
