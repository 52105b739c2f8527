from __future__ import annotations

import numpy as np
import pytest
import torch

from calque import passes
from calque.artifact import TensorSpec
from calque.errors import Unsupported
from calque.passes import Pass
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.keep_last_logits import KeepLastLogits, head_chain
from tests.passes.check_pass import check_pass
from tests.tiny_models import VOCABULARY, answers, prompt, traced

aten = torch.ops.aten


# gemma2 caps its logits: the cut goes above the head, past the whole chain.
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_last_position_is_what_it_was_when_the_others_are_dropped(name: str) -> None:
    model = traced(name)
    check_pass(KeepLastLogits("last"), model, prompt(model))
    assert model.outputs[0] == TensorSpec("logits", "float32", ("batch_size", 1, VOCABULARY))
    assert answers(model, prompt(model))["logits"].shape == (2, 1, VOCABULARY)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(("count", "kept"), [(0, 5), (1, 1), (3, 3)])
def test_as_many_positions_are_kept_as_the_caller_asks_for(name: str, count: int, kept: int) -> None:
    model = traced(name)
    check_pass(KeepLastLogits("dynamic"), model, {**prompt(model), "num_logits_to_keep": np.array(count)})
    assert model.inputs[-1] == TensorSpec("num_logits_to_keep", "int64", ())
    assert model.outputs[0].shape == ("batch_size", "num_logits_to_keep", VOCABULARY)
    logits = answers(model, {**prompt(model), "num_logits_to_keep": np.array(count)})["logits"]
    assert logits.shape == (2, kept, VOCABULARY)


def test_head_computes_only_what_is_kept() -> None:
    model = traced("llama")
    passes.run_one(KeepLastLogits("last"), model)
    logits = model.output_node().args[0][0]  # type: ignore[index]
    head = head_chain(logits)[0]  # type: ignore[arg-type]
    assert head.args[0].target is aten.slice.Tensor  # type: ignore[union-attr]
    assert head.meta["val"].shape[1] == 1


@pytest.mark.parametrize("order", [0, 1])
def test_cut_and_cache_can_be_applied_in_either_order(order: int) -> None:
    model = traced("llama")
    plan: list[Pass] = [KeepLastLogits("dynamic"), CacheDynamic()]
    passes.run(plan[::-1] if order else plan, model)
    inputs = {**prompt(model), "num_logits_to_keep": np.array(2)}
    whole = traced("llama")
    passes.run([CacheDynamic()], whole)
    expected, got = answers(whole, prompt(whole)), answers(model, inputs)
    np.testing.assert_allclose(got["logits"], expected["logits"][:, -2:], rtol=0, atol=1e-5 * expected["logits"].std())
    np.testing.assert_array_equal(got["present.1.key"], expected["present.1.key"])


def test_logits_without_a_linear_head_are_refused_with_the_node_in_the_way() -> None:
    model = traced("llama")
    logits = model.output_node().args[0][0]  # type: ignore[index]
    with model.graph.inserting_after(logits):  # type: ignore[arg-type]
        sorted_ = model.graph.call_function(aten.cumsum.default, (logits, 1))
    sorted_.meta = dict(logits.meta)  # type: ignore[union-attr]
    logits.replace_all_uses_with(sorted_, delete_user_cb=lambda user: user is not sorted_)  # type: ignore[union-attr]
    with pytest.raises(Unsupported) as caught:
        KeepLastLogits().apply(model)
    assert str(caught.value) == (
        "Unsupported: keep_last_logits finds no linear head above the logits\n"
        "  cumsum_default: aten.cumsum.default\n"
        "Fix: convert with --logits all"
    )
