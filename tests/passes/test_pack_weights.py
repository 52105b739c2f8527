"""Integers become bytes where a product or a lookup reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calque import passes
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.pack_weights import PackWeights
from calque.passes.quantize_weights import QuantizeWeights
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel, user_nodes
from calque.traced_session import TracedSession
from tests.tiny_models import answers, prompt, traced

calque = torch.ops.calque


def packed(name: str, quantize: QuantizeWeights) -> tuple[TracedModel, TracedModel, passes.Rewrites]:
    """The model with its integers apart and packed, and what packing did."""
    model = traced(name)
    passes.run([quantize, CacheDynamic()], model)
    apart = model.copy()
    return apart, model, passes.run_one(PackWeights(), model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "quantize",
    [
        QuantizeWeights(group=16),
        QuantizeWeights(group=32, symmetric=False),
        QuantizeWeights(bits=8, group=0),
        QuantizeWeights(8, 16, False),
    ],
    ids=str,
)
def test_packing_changes_no_value(name: str, quantize: QuantizeWeights) -> None:
    apart, together, done = packed(name, quantize)
    assert done.count >= 11
    assert not done.skipped
    assert not user_nodes(together.graph.nodes, calque.dequantize_weight.default)
    inputs = prompt(apart)
    want, got = (np.asarray(TracedSession(model)("model", inputs)["logits"], np.float32) for model in (apart, together))
    assert np.abs(want - got).max() < 1e-5 * want.std()


def test_packing_twice_changes_nothing() -> None:
    _, model, _ = packed("llama", QuantizeWeights(group=16))
    nodes = len(model.graph.nodes)
    assert passes.run_one(PackWeights(), model).count == 0
    assert len(model.graph.nodes) == nodes


def test_a_tied_table_is_packed_once() -> None:
    apart, model, _ = packed("gemma2", QuantizeWeights(group=16))
    products = user_nodes(model.graph.nodes, calque.packed_linear.default)
    [lookup] = user_nodes(model.graph.nodes, calque.packed_embedding.default)
    assert products[-1].args[1] is lookup.args[1]
    assert model.weights.nbytes() < 0.7 * apart.weights.nbytes()


def test_integers_that_something_else_reads_are_left() -> None:
    model = traced("llama")
    passes.run([QuantizeWeights(group=16), CacheDynamic()], model)
    node = user_nodes(model.graph.nodes, calque.dequantize_weight.default)[1]
    user = next(iter(node.users))
    with model.graph.inserting_before(user):
        doubled = model.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.0))
        doubled.meta["val"] = node.meta["val"]
    user.replace_input_with(node, doubled)
    done = passes.run_one(PackWeights(), model)
    assert done.skipped == ((node.name, "aten.mul.Tensor reads it, which has no form that takes integers"),)
    assert len(user_nodes(model.graph.nodes, calque.dequantize_weight.default)) == 1


def test_numbers_of_e4m3_are_left_as_they_are_and_not_stacked_with_integers() -> None:
    model = traced("llama")
    passes.run([QuantizeWeights(overrides={"*down_proj*": "fp8", "*q_proj*": "fp8"}), *OnnxRuntime().passes("fp32")], model)
    inputs = prompt(model)
    before = answers(model, inputs)["logits"]
    done = passes.run_one(PackWeights(), model)
    assert [reason for _, reason in done.skipped] == ["it is stored as fp8, which has no operator that takes packed bytes"] * 4
    assert np.abs(answers(model, inputs)["logits"] - before).max() < 1e-4 * before.std()
