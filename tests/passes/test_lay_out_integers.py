from __future__ import annotations

import pytest
import torch

from calque import passes
from calque.choices import QUANTIZED
from calque.passes.lay_out_integers import LayOutIntegers
from calque.passes.quantize_activations import QuantizeActivations
from calque.passes.quantize_weights import QuantizeWeights
from calque.traced import TracedModel, user_nodes
from tests.passes.check_pass import check_pass, histogram
from tests.tiny_models import prompt, traced

calque = torch.ops.calque
DEQUANTIZE, LOOKUP, DYNAMIC = "calque.dequantize_linear.default", "calque.dequantize_lookup.default", "calque.dynamic_linear.default"
PER_CHANNEL = QuantizeWeights(bits=8, group=0)


def quantized(name: str, *first: passes.Pass) -> TracedModel:
    model = traced(name)
    passes.run(first, model)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize("weights", [QuantizeWeights(), QuantizeWeights(symmetric=False), PER_CHANNEL], ids=str)
def test_products_and_lookups_read_integers_as_they_lie(name: str, weights: QuantizeWeights) -> None:
    model = quantized(name, weights)
    readers = [user for node in user_nodes(model.graph.nodes, calque.dequantize_weight.default) for user in node.users]
    done = check_pass(LayOutIntegers(), model, prompt(model))
    assert (done.count, done.skipped) == (len(readers), ())
    found = histogram(model)
    assert found["calque.dequantize_weight.default"] == 0
    assert found[DEQUANTIZE] == found["aten.matmul.default"] - histogram(traced(name))["aten.matmul.default"]
    assert found[LOOKUP] == (2 if name == "gpt2" else 1)


@pytest.mark.parametrize("weights", [QuantizeWeights(symmetric=False), PER_CHANNEL], ids=str)
def test_tied_table_is_stored_once_as_its_head_reads_it(weights: QuantizeWeights) -> None:
    model = quantized("gemma2", weights)
    [head] = [name for name, node in model.parameters().items() if name.endswith(".q") and tuple(node.meta["val"].shape) == (211, 64)]
    q, before = model.weights[head].read(), model.weights.nbytes()
    check_pass(LayOutIntegers(), model, prompt(model))
    assert model.weights.nbytes() == before
    assert head not in model.weights
    assert torch.equal(model.weights[f"{head}.transposed"].read(), q.t())


def test_untied_table_stays_as_it_lies() -> None:
    model = quantized("llama", PER_CHANNEL)
    q = model.weights["model.embed_tokens.weight.q"]
    passes.run_one(LayOutIntegers(), model)
    assert model.weights["model.embed_tokens.weight.q"] is q


def test_table_of_four_bits_becomes_numbers_before_it_is_looked_up() -> None:
    model = quantized("llama", QuantizeWeights(embedding="int4"))
    check_pass(LayOutIntegers(), model, prompt(model))
    assert (histogram(model)[LOOKUP], histogram(model)["aten.embedding.default"]) == (0, 1)
    tied = quantized("gemma2", QuantizeWeights(head="int4"))
    check_pass(LayOutIntegers(), tied, prompt(tied))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_rounded_activations_and_integers_per_channel_become_one_product(name: str) -> None:
    model = quantized(name, QuantizeActivations(), PER_CHANNEL)
    rounded = sum(len(node.users) for node in user_nodes(model.graph.nodes, calque.round_activations.default))
    # Sums of products in another order may fall on the other side of a step.
    done = check_pass(LayOutIntegers(), model, prompt(model), rounding=0.2)
    assert done.skipped == ()
    found = histogram(model)
    assert (found[DYNAMIC], found["calque.round_activations.default"]) == (rounded, 0)


def test_rounding_is_taken_back_where_the_weight_does_not_go_with_it() -> None:
    keeps_head = QuantizeWeights(bits=8, group=0, head="keep", overrides={"*.down_proj.weight": "keep"})
    model = quantized("llama", QuantizeActivations(), keeps_head)
    done = passes.run_one(LayOutIntegers(), model)
    assert len(done.skipped) == 3  # two of layers, and the head
    assert all("not rounded" in reason for _, reason in done.skipped)
    found = histogram(model)
    assert (found[DYNAMIC], found["aten.linear.default"], found["calque.round_activations.default"]) == (12, 3, 0)


def test_static_rounding_is_taken_back_from_groups() -> None:
    model = traced("llama")
    model.samples = ((5, 6, 7, 8),)
    passes.run([QuantizeActivations("static"), QuantizeWeights()], model)
    done = passes.run_one(LayOutIntegers(), model)
    assert len(done.skipped) == 15
    assert "calque.quantize_linear.default" not in histogram(model)


NUMBERS = LayOutIntegers("numbers")
FP8 = QuantizeWeights(**QUANTIZED["fp8"])


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama", PER_CHANNEL),
        ("llama", QuantizeWeights(symmetric=False)),
        ("gemma2", QuantizeWeights(embedding="int4", head="int4")),
        ("gpt2", PER_CHANNEL),
    ],
    ids=str,
)
def test_tables_are_looked_up_as_the_numbers_that_their_integers_stand_for(name: str, weights: QuantizeWeights) -> None:
    model = quantized(name, weights)
    replaced = dict(model.replaced)
    check_pass(NUMBERS, model, prompt(model))
    found = histogram(model)
    assert (found[LOOKUP], found["calque.dequantize_weight.default"]) == (0, 0)
    tables = {key: weight for key, weight in model.weights.entries.items() if key.endswith(".numbers")}
    assert len(tables) == (2 if name == "gpt2" else 1)
    for key, table in tables.items():
        assert torch.equal(table.read(), replaced[key.removesuffix(".numbers")].read()), key
        assert table.by_rows
        assert key.replace(".numbers", ".q") not in model.weights


def test_tied_head_keeps_reading_the_integers() -> None:
    model = quantized("gemma2", PER_CHANNEL)
    passes.run_one(NUMBERS, model)
    [table] = [key for key in model.weights.entries if key.endswith(".numbers")]
    head = model.weights[table.replace(".numbers", ".q.transposed")]
    assert head.read().dtype == torch.int8
    assert histogram(model)[DEQUANTIZE] == 15


def test_numbers_that_e4m3_stands_for_are_looked_up_as_well() -> None:
    model = quantized("llama", QuantizeWeights(bits=8, group=0, format="e4m3", embedding="fp8", head="fp8"))
    entries = model.copy()
    check_pass(NUMBERS, model, prompt(model))
    assert histogram(model)[DEQUANTIZE] == 15
    check_pass(LayOutIntegers(), entries, prompt(entries))
    assert histogram(entries)[LOOKUP] == 1


def test_integers_of_experts_have_their_scale_by_output() -> None:
    model = quantized("mixtral", PER_CHANNEL)
    done = check_pass(LayOutIntegers(), model, prompt(model))
    assert len(done.skipped) == 4
    assert histogram(model)["calque.dequantize_weight.default"] == 0
    shapes = {tuple(node.args[1].meta["val"].shape) for node in user_nodes(model.graph.nodes, calque.dequantize_linear.default)}  # type: ignore[union-attr]
    assert {len(shape) for shape in shapes} == {1}


def static(name: str, activations: QuantizeActivations, weights: QuantizeWeights) -> TracedModel:
    model = traced(name)
    model.samples = ((5, 6, 7, 8),)
    passes.run([activations, weights], model)
    return model


def test_values_of_e4m3_go_with_weights_of_e4m3_and_not_with_a_head_that_stays() -> None:
    model = static("llama", QuantizeActivations("auto", format="e4m3"), FP8)
    assert "lm_head.weight" in model.rounding
    done = passes.run_one(LayOutIntegers(), model)
    assert [reason for _, reason in done.skipped] == [
        "its values are not rounded: its weight is not of fp8 per channel without zero points"
    ]
    assert len(model.rounding) == 14
    assert "lm_head.weight" not in model.rounding
    assert histogram(model)["calque.quantize_linear.default"] == 8


@pytest.mark.parametrize(
    ("activations", "weights"),
    [(QuantizeActivations("static", symmetric=True), FP8), (QuantizeActivations("auto", format="e4m3"), PER_CHANNEL)],
)
def test_one_format_is_not_multiplied_by_another(activations: QuantizeActivations, weights: QuantizeWeights) -> None:
    model = static("llama", activations, weights)
    done = passes.run_one(LayOutIntegers(), model)
    assert len(done.skipped) == 15
    assert "calque.quantize_linear.default" not in histogram(model)


def test_symmetric_values_of_int8_go_with_weights_of_int8() -> None:
    model = static("llama", QuantizeActivations("static", symmetric=True), PER_CHANNEL)
    assert passes.run_one(LayOutIntegers(), model).skipped == ()
    assert histogram(model)["calque.quantize_linear.default"] == 9
