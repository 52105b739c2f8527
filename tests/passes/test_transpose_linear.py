from __future__ import annotations

import pytest
import torch

from calque import passes
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.transpose_linear import TransposeLinear
from calque.weights import Derived
from tests.passes.check_pass import check_pass, histogram
from tests.tiny_models import prompt, traced

TIED = "tied, or read by other operators too"


def test_every_weight_of_a_linear_layer_is_stored_input_major() -> None:
    model = traced("llama")
    layers = histogram(model)["aten.linear.default"]
    done = check_pass(TransposeLinear(), model, prompt(model))
    assert (done.count, done.skipped) == (layers, ())
    assert histogram(model)["aten.linear.default"] == 0
    weight = model.weights["model.layers.0.mlp.up_proj.weight.transposed"]
    assert isinstance(weight, Derived)
    assert (weight.operation, weight.shape) == ("transpose", (64, 96))
    assert "model.layers.0.mlp.up_proj.weight" not in model.weights


def test_bias_is_added_after_the_product() -> None:
    model = traced("qwen2")
    biased = sum(
        len(node.args) > 2 and node.args[2] is not None for node in model.graph.nodes if node.target is torch.ops.aten.linear.default
    )
    assert biased == 6
    check_pass(TransposeLinear(), model, prompt(model))


@pytest.mark.parametrize(("name", "head"), [("gemma2", "lm_head.weight"), ("gpt2", "lm_head.weight")])
def test_tied_head_is_left_alone_and_the_reason_given(name: str, head: str) -> None:
    model = traced(name)
    tied = model.weights[head]
    assert ((head, TIED) in TransposeLinear().apply(model).skipped) or (
        (model.weights.tied(head)[0], TIED) in TransposeLinear().apply(model).skipped
    )
    assert model.weights[head] is tied


def test_weight_that_something_else_reads_is_left_alone() -> None:
    model = traced("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.parameters()[name]
    reader = next(iter(weight.users))
    with model.graph.inserting_before(reader):
        doubled = model.graph.call_function(torch.ops.aten.mul.Tensor, (weight, 1.0))
    doubled.meta = dict(weight.meta)
    assert (name, TIED) in TransposeLinear().apply(model).skipped


def test_bytes_to_emit_stay_the_same() -> None:
    model = traced("llama")
    before = model.weights.nbytes()
    passes.run([CacheDynamic(), TransposeLinear()], model)
    assert model.weights.nbytes() == before
