from __future__ import annotations

import pytest
import torch

from calque.passes import Rewrites
from calque.passes.cache_dynamic import CacheDynamic
from tests.passes.check_pass import check_pass, histogram
from tests.tiny_models import prompt, traced


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_states_become_inputs_and_outputs_that_grow(name: str) -> None:
    model = traced(name)
    done = check_pass(CacheDynamic(), model, prompt(model))
    assert done == Rewrites(2 * model.layers)
    assert model.settled
    assert [spec.name for spec in model.outputs] == ["logits", *(state.output for state in model.states)]
    for state, spec in zip(model.states, model.outputs[1:], strict=True):
        assert spec.shape == ("batch_size", state.shape[1], "total_sequence_length", state.shape[3])
        assert spec.dtype == state.dtype


def test_no_operator_on_states_is_left() -> None:
    model = traced("llama")
    before = histogram(model)
    CacheDynamic().apply(model)
    after = histogram(model)
    assert before["calque.cache_update.default"] == 4
    assert after["calque.cache_update.default"] == 0
    assert after["aten.cat.default"] - before["aten.cat.default"] == 4


def test_present_is_what_attention_reads() -> None:
    model = traced("llama")
    CacheDynamic().apply(model)
    attentions = [node for node in model.graph.nodes if node.target is torch.ops.calque.attention.default]
    returned = model.output_node().args[0]
    assert isinstance(returned, tuple)
    assert [node for attention in attentions for node in attention.args[1:3]] == list(returned[1:])
