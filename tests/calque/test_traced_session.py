from __future__ import annotations

import numpy as np
import pytest
import torch

from calque import passes
from calque.errors import UsageError
from calque.passes.cache_dynamic import CacheDynamic
from calque.traced_session import TracedSession
from tests.tiny_models import TYPES, answers, prompt, source_of, traced


def eager_logits(name: str, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with torch.inference_mode():
        logits: torch.Tensor = source_of(name).load_eager()(input_ids=torch.from_numpy(ids)).logits
    return logits.numpy()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_trace_agrees_with_eager_at_a_length_it_was_not_traced_at(name: str) -> None:
    assert name in TYPES
    model = traced(name)
    inputs = prompt(model, 13)
    expected = eager_logits(name, inputs["input_ids"])
    got = answers(model, inputs)["logits"]
    assert np.abs(got - expected).max() / expected.std() < 2e-5


def test_unsettled_states_are_given_under_the_names_they_will_have() -> None:
    model = traced("llama")
    outputs = answers(model, prompt(model))
    assert list(outputs) == ["logits", *(state.output for state in model.states)]
    assert outputs["present.1.value"].shape == (2, 2, 5, 24)


def test_settled_graph_gives_what_the_unsettled_one_gave() -> None:
    before, after = traced("llama"), traced("llama")
    passes.run([CacheDynamic()], after)
    inputs = prompt(before)
    expected, got = answers(before, inputs), answers(after, inputs)
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)


def test_chained_step_equals_the_whole_row() -> None:
    model = traced("llama")
    inputs = prompt(model, 6)
    whole = answers(model, inputs)["logits"]
    first = {name: array[:, :5] if name in ("input_ids", "attention_mask", "position_ids") else array for name, array in inputs.items()}
    held = answers(model, first)
    step = {name: array[:, 5:] for name, array in inputs.items() if name in ("input_ids", "position_ids")}
    step |= {"attention_mask": inputs["attention_mask"], **{state.input: held[state.output] for state in model.states}}
    np.testing.assert_allclose(answers(model, step)["logits"], whole[:, 5:], rtol=0, atol=1e-5 * whole.std())


@pytest.mark.parametrize(("count", "kept"), [(0, 5), (1, 1), (2, 2)])
def test_count_of_logits_is_obeyed_by_a_graph_that_keeps_all(count: int, kept: int) -> None:
    model = traced("llama")
    session, inputs = TracedSession(model), prompt(model)
    cut = session("model", {**inputs, "num_logits_to_keep": np.array(count)})["logits"]
    np.testing.assert_array_equal(cut, session("model", inputs)["logits"][:, -kept:])


def test_missing_inputs_are_all_named() -> None:
    model = traced("llama")
    inputs = prompt(model)
    del inputs["position_ids"], inputs["past_key_values.0.key"]
    with pytest.raises(UsageError) as caught:
        answers(model, inputs)
    assert str(caught.value) == "UsageError: inputs are missing\n  position_ids\n  past_key_values.0.key"


def test_inputs_are_left_as_they_were() -> None:
    model = traced("llama")
    inputs = prompt(model)
    before = {name: array.copy() for name, array in inputs.items()}
    answers(model, inputs)
    for name, array in before.items():
        np.testing.assert_array_equal(inputs[name], array)
