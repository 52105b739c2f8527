from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calque import passes
from calque.errors import Unsupported
from calque.passes import Rewrites
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.cache_static import CacheStatic
from calque.traced import TracedModel, user_nodes
from calque.traced_session import TracedSession
from tests.passes.check_pass import ROUNDING, histogram
from tests.tiny_models import TYPES, prompt, traced

SLOTS = 24
# What lies in slots that nothing was written to: as large as a cache that was used before may hold.
LEFT_BEHIND = 50.0


def static(name: str, slots: int = SLOTS) -> TracedModel:
    model = traced(name)
    passes.run([CacheStatic(slots)], model)
    return model


def slots_of(model: TracedModel, rows: int) -> dict[str, NDArray[Any]]:
    return {state.input: np.full((rows, *state.shape[1:]), LEFT_BEHIND, np.float32) for state in model.states}  # type: ignore[arg-type]


def fed(ids: NDArray[Any], first: list[int], last: list[int]) -> dict[str, NDArray[Any]]:
    write = np.array(first, np.int64)
    positions = np.minimum(write[:, None] + np.arange(ids.shape[1]), np.array(last)[:, None] - 1)
    return {"input_ids": ids, "position_ids": positions, "write_indices": write, "kv_lengths": np.array(last, np.int32)}


def alone(name: str, ids: NDArray[Any]) -> NDArray[Any]:
    """The logits of one row by the dynamic layout, in one call."""
    model = traced(name)
    inputs = prompt(model, len(ids))
    passes.run([CacheDynamic()], model)
    row = {key: value[:1] for key, value in inputs.items()} | {"input_ids": ids[None]}
    logits: NDArray[Any] = TracedSession(model)("model", row)["logits"][0]
    return logits


# One of each kind of layer, of position and of window.
QUICK = {"llama", "gemma2", "phi3-longrope", "gpt2", "gpt_oss", "qwen3_moe", "bloom"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TYPES])
def test_rows_of_unequal_length_go_on_from_their_own_slots(name: str) -> None:
    model = static(name)
    session, rng = TracedSession(model), np.random.default_rng(5)
    ids = rng.integers(3, 200, (2, 12))
    first = session("model", fed(ids[:, :8], [0, 0], [8, 3]) | slots_of(model, 2))
    kept = {state.input: first[state.output] for state in model.states}
    # Row 1 had 3 tokens: its next lie right after them, over what padding wrote there.
    more = np.stack([ids[0, 8:12], ids[1, 3:7]])
    second = session("model", fed(more, [8, 3], [12, 7]) | kept)
    for row, got in ((0, [first["logits"][0], second["logits"][0]]), (1, [first["logits"][1, :3], second["logits"][1]])):
        told = np.concatenate(got)
        wanted = alone(name, ids[row, : len(told)])
        assert np.abs(told - wanted).max() <= ROUNDING * wanted.std()


def test_states_are_inputs_and_outputs_of_one_shape() -> None:
    model = traced("gemma3_text")
    assert passes.run_one(CacheStatic(SLOTS), model) == Rewrites(6)
    assert model.settled
    for state in model.states:
        assert (state.update, state.grow_axis, state.init) == ("in_place", None, "zeros")
        assert state.shape[2] == SLOTS
    shapes = {spec.name: spec.shape for spec in (*model.inputs, *model.outputs)}
    assert all(shapes[state.input] == shapes[state.output] == state.shape for state in model.states)
    assert [state.window for state in model.states] == [8, 8, None, None, 8, 8]
    model.graph.lint()
    model.program.validate()  # type: ignore[no-untyped-call]


def test_inputs_are_those_of_a_static_cache() -> None:
    plain = ("input_ids", "position_ids", "write_indices", "kv_lengths")
    for name in ("llama", "bloom"):  # bloom counts positions from the mask
        model = static(name)
        assert tuple(spec.name for spec in model.inputs) == (*plain, *(state.input for state in model.states))
        specs = {spec.name: (spec.dtype, spec.shape) for spec in model.inputs}
        assert specs["write_indices"] == ("int64", ("batch_size",))
        assert specs["kv_lengths"] == ("int32", ("batch_size",))


def test_nothing_of_the_layout_before_is_left() -> None:
    model = static("gpt2")
    found = histogram(model)
    assert found["calque.cache_update.default"] == 0
    assert found["calque.write_slots.default"] == 4
    inputs = model.placeholders()
    past = {inputs[state.input].name for state in model.states}
    sizes = [node for node in user_nodes(model.graph.nodes, torch.ops.aten.sym_size.int) if node.args[1] == 2]
    assert past.isdisjoint(str(node.args[0]) for node in sizes)


def test_the_limits_are_those_of_the_slots() -> None:
    assert static("llama").limits.max_length == SLOTS
    assert static("llama").limits.padding == "right"
    assert static("gpt2", 1000).limits.max_length == 64  # its table of positions ends there


@pytest.mark.parametrize(("limit", "trained", "slots"), [(None, 512, 512), (None, 131072, 2048), (None, None, 2048), (40, 512, 40)])
def test_slots_without_an_option_are_the_limit_or_what_the_model_was_trained_for(limit: Any, trained: Any, slots: int) -> None:
    model = replace(traced("llama"), trained_length=trained)
    model.limits = replace(model.limits, max_length=limit)
    CacheStatic().apply(model)
    assert model.limits.max_length == slots


def test_a_settled_model_is_left_alone() -> None:
    model = static("llama")
    code, inputs = str(model.graph), model.inputs
    assert passes.run_one(CacheStatic(), model) == Rewrites(0)
    assert (str(model.graph), model.inputs) == (code, inputs)


def test_a_mask_without_a_meaning_is_refused_with_its_line() -> None:
    model = traced("llama")
    for mask in user_nodes(model.graph.nodes, torch.ops.calque.attention_mask.default):
        mask.update_arg(2, "custom")
    with pytest.raises(Unsupported, match="whose meaning is known") as raised:
        CacheStatic().apply(model)
    assert any("modeling_llama.py" in line for line in raised.value.where)


def test_a_length_before_the_call_is_refused_with_its_line() -> None:
    model = traced("llama")
    past = model.placeholders()["past_key_values.0.key"]
    add = next(node for node in model.graph.nodes if node.target is torch.ops.calque.attention.default)
    with model.graph.inserting_before(add):
        size = model.graph.call_function(torch.ops.aten.sym_size.int, (past, 2))
        size.meta["val"] = past.meta["val"].shape[2]
        scaled = model.graph.call_function(torch.ops.aten.mul.Tensor, (add.args[0], size))
        scaled.meta = dict(add.meta)
    add.update_arg(0, scaled)
    with pytest.raises(Unsupported, match="no length before the call") as raised:
        CacheStatic().apply(model)
    assert "aten.mul.Tensor" in raised.value.where[0]


def test_a_cache_of_less_than_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length: -1"):
        CacheStatic(-1)
