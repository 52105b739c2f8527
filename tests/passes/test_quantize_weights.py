from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calque import passes
from calque.awq import channel_scales, product_error
from calque.calibration import Moments
from calque.choices import QUANTIZED
from calque.converters import causal_lm
from calque.errors import UsageError
from calque.facts import weights_by_layer
from calque.gptq import gptq
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.pack_weights import PackWeights
from calque.passes.quantize_weights import QuantizeWeights, stored_as
from calque.quantization import Quantized, Scheme, dequantize, quantize
from calque.quantized_weight import QuantizedWeight
from calque.source import ModelSource
from calque.traced import TracedModel, call, user_nodes
from calque.validation.eager import with_weights
from tests.tiny_models import TYPES, answers, prompt, save_random, source_of, traced

METHODS = ("nearest", "awq", "gptq")
dequantize_weight = torch.ops.calque.dequantize_weight.default


def samples(seed: int = 0, rows: int = 8, length: int = 40) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.random.default_rng(seed + row).integers(3, 211, length).tolist()) for row in range(rows))


def calibrated(name: str, seed: int = 0) -> TracedModel:
    model = traced(name)
    model.samples = samples(seed)
    return model


def integers(model: TracedModel) -> dict[str, torch.Tensor]:
    return {name: weight.read() for name, weight in model.weights.entries.items() if name.endswith(".q")}


def eager_logits(source: ModelSource, model: TracedModel, inputs: dict[str, Any]) -> Any:
    """What the untouched model gives with the weights that the pass says it stands for."""
    eager = with_weights(source.load_eager(), model.replaced)
    with torch.no_grad():
        return eager(torch.tensor(inputs["input_ids"])).logits.numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mixtral", "phi3", "bloom"))]
)
def test_the_graph_computes_what_eager_does_with_the_replaced_weights(name: str, method: Any) -> None:
    model = calibrated(name)
    done = passes.run_one(QuantizeWeights(method=method, group=16), model)
    assert done.count == len(integers(model)) > 8
    inputs = prompt(model, 9)
    expected = eager_logits(source_of(name), model, inputs)
    assert np.abs(answers(model, inputs)["logits"] - expected).max() <= 1e-5 * expected.std()
    assert passes.run_one(QuantizeWeights(method=method, group=16), model).count == 0


def test_a_weight_is_there_before_the_first_that_reads_it_whatever_pass_put_that_there() -> None:
    model = traced("llama")
    weight = model.parameters()["model.layers.0.self_attn.q_proj.weight"]
    [reader] = weight.users
    with model.graph.inserting_before(reader):
        earlier = call(model.graph, torch.ops.aten.linear.default, reader.args[0], weight)
    with model.graph.inserting_before(reader.next):
        total = call(model.graph, torch.ops.aten.add.Tensor, reader, earlier)
    reader.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    passes.run((QuantizeWeights(bits=8, group=0),), model)  # which lints the graph
    assert not weight.users


def test_tied_tables_are_one_weight_that_the_head_decides() -> None:
    model = traced("gpt2")
    passes.run_one(QuantizeWeights(embedding="keep", head="int8", overrides={"*wpe*": "keep"}), model)
    names = [name for name in model.weights.entries if name.endswith(".q")]
    assert len([name for name in names if "wte" in name or "lm_head" in name]) == 1
    inputs = prompt(model, 9)
    expected = eager_logits(source_of("gpt2"), model, inputs)
    assert np.abs(answers(model, inputs)["logits"] - expected).max() <= 1e-5 * expected.std()
    assert "transformer.wpe.weight" in model.weights


def test_weights_that_lie_inputs_first_are_grouped_along_their_inputs() -> None:
    model = traced("gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = model.weights[name].read()
    passes.run_one(QuantizeWeights(group=16), model)
    made = quantize(weight.t().contiguous(), Scheme(group=16))
    assert torch.equal(model.weights[f"{name}.q"].read(), made.q)
    assert torch.equal(model.replaced[name].read(), dequantize(made.q, made.scale, None, 16).t())


def test_the_first_pattern_that_fits_decides_what_a_weight_is_stored_as() -> None:
    model = traced("llama")
    overrides: Any = {"*layers.0.mlp.down*": "keep", "*down_proj*": "int8"}
    done = passes.run_one(QuantizeWeights(overrides=overrides), model)
    assert ("model.layers.0.mlp.down_proj.weight", "kept as it is") in done.skipped
    assert "model.layers.0.mlp.down_proj.weight" not in model.replaced
    bits = {str(node.args[0]): node.args[3] for node in user_nodes(model.graph.nodes, dequantize_weight)}
    assert bits["p_model_layers_1_mlp_down_proj_weight_q"] == 8
    assert bits["p_model_layers_1_mlp_up_proj_weight_q"] == 4


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_what_is_kept_takes_no_scales(method: Any) -> None:
    model = calibrated("llama")
    overrides: Any = {"*layers.0.mlp.down*": "keep", "*layers.0.self_attn.k_proj*": "keep"}
    done = passes.run_one(QuantizeWeights(method=method, overrides=overrides, group=16), model)
    assert "model.layers.0.input_layernorm.weight" not in model.replaced
    if method == "awq":
        assert (
            "model.layers.0.self_attn.q_proj.weight",
            "rounded without scales: aten.linear.default reads the value as well",
        ) in done.skipped
    inputs = prompt(model, 9)
    expected = eager_logits(source_of("llama"), model, inputs)
    assert np.abs(answers(model, inputs)["logits"] - expected).max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("group", [8, 48, 512])
def test_a_group_that_no_runtime_has_is_refused(group: int) -> None:
    with pytest.raises(ValueError, match="group: must be 16"):
        QuantizeWeights(group=group)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_calibrated_method_without_a_text_is_refused(method: Any) -> None:
    with pytest.raises(UsageError, match=f"{method} measures the model on a text") as caught:
        passes.run_one(QuantizeWeights(method=method), traced("llama"))
    assert "--calibration" in caught.value.fix


def test_auto_measures_where_there_is_a_text_and_rounds_to_nearest_where_there_is_none() -> None:
    made = {}
    for name, method, rows in (("none", "auto", ()), ("text", "auto", samples()), ("nearest", "nearest", samples())):
        model = traced("llama")
        model.samples = rows
        passes.run_one(QuantizeWeights(method=method), model)  # type: ignore[arg-type]
        made[name] = integers(model)
    assert all(torch.equal(made["none"][name], made["nearest"][name]) for name in made["none"])
    # Every product's weight but those of tables came out otherwise: a text that is ignored would show.
    same = [name for name in made["none"] if torch.equal(made["none"][name], made["text"][name])]
    assert same == ["model.embed_tokens.weight.q"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_another_text_gives_other_integers_and_the_same_text_the_same(method: Any) -> None:
    made = []
    for seed in (0, 0, 50):
        model = calibrated("llama", seed)
        model.calibrations = {}
        passes.run_one(QuantizeWeights(method=method), model)
        made.append(integers(model)["model.layers.1.mlp.down_proj.weight.q"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_calibration_that_the_artifact_ignores_is_told_from_the_replaced_weights(method: Any) -> None:
    # What eager is given is measured; what the graph holds in its place is not.
    model = calibrated("llama")
    passes.run_one(QuantizeWeights(method=method, group=16), model)
    ignored = traced("llama")
    passes.run_one(QuantizeWeights(method="nearest", group=16), ignored)
    inputs = prompt(model, 9)
    expected = eager_logits(source_of("llama"), model, inputs)
    assert np.abs(answers(ignored, inputs)["logits"] - expected).max() > 1e-2 * expected.std()


def test_a_norm_that_keeps_its_weight_although_products_were_scaled_is_told() -> None:
    model = calibrated("gemma2")
    before = dict(model.weights.entries)
    passes.run_one(QuantizeWeights(method="awq", group=16), model)
    inputs = prompt(model, 9)
    expected = eager_logits(source_of("gemma2"), model, inputs)
    name = "model.layers.0.input_layernorm.weight"
    assert model.weights[name] is not before[name]
    model.weights.entries[name] = before[name]
    assert np.abs(answers(model, inputs)["logits"] - expected).max() > 1e-2 * expected.std()


def test_nothing_is_measured_before_integers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated("llama")
    model.calibrations = {}
    monkeypatch.setattr("calque.calibrated.Stream", None)
    passes.run_one(QuantizeWeights(method="gptq"), model)
    with pytest.raises(TypeError):
        model.weights["model.layers.0.mlp.up_proj.weight.q"].read()


def test_two_traces_that_share_what_was_measured_have_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = calibrated("llama"), calibrated("llama")
    first.calibrations = again.calibrations = {}
    passes.run_one(QuantizeWeights(method="gptq"), first)
    made = integers(first)
    monkeypatch.setattr("calque.calibrated.gptq", None)
    passes.run_one(QuantizeWeights(method="gptq"), again)
    assert all(torch.equal(made[name], weight) for name, weight in integers(again).items())


def outlying(seed: int, rows: int = 400, size: int = 64) -> torch.Tensor:
    """Vectors whose channels hang together, a few of them twenty times as large as the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    large = torch.where(torch.rand(size, generator=generator) < 0.08, 20.0, 1.0)
    vectors: torch.Tensor = (torch.randn(rows, size, generator=generator) @ mixing) * large
    return vectors


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(4, 16, symmetric=False), Scheme(4, 0), Scheme(8, 32)], ids=str)
def test_gptq_and_awq_lose_less_of_a_product_than_rounding_to_nearest(scheme: Scheme) -> None:
    moments = Moments()
    moments.add(outlying(0))
    unseen = outlying(0, 800)[400:]  # the same channels, other vectors
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(9))
    scales = channel_scales([(weight, scheme)], moments)

    def lost(made: Quantized, scales: Any = 1.0) -> float:
        float_weight = dequantize(made.q, made.scale, made.zero_point, scheme.group) / scales
        return float((unseen @ (float_weight - weight).t()).square().sum())

    nearest = lost(quantize(weight, scheme))
    assert lost(gptq(weight, moments.second, scheme)) < 0.7 * nearest
    assert lost(quantize(weight * scales, scheme, moments.second.diagonal() / scales.square()), scales) < 0.8 * nearest


def test_the_error_of_a_product_is_that_of_what_it_gives() -> None:
    vectors, scheme = outlying(3), Scheme(4, 16, search=False)
    moments = Moments()
    moments.add(vectors)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    made = quantize(weight, scheme)
    direct = (vectors @ (dequantize(made.q, made.scale, None, 16) - weight).t()).square().sum(1).mean()
    assert product_error(weight, scheme, moments, torch.ones(64)) == pytest.approx(float(direct), rel=1e-4)


def test_gptq_of_channels_that_do_not_hang_together_rounds_to_nearest() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    scheme = Scheme(4, 16)
    made, nearest = gptq(weight, torch.eye(32), scheme), quantize(weight, scheme)
    assert torch.equal(made.q, nearest.q)
    assert torch.equal(made.scale, nearest.scale)


def test_gptq_survives_channels_that_read_nothing_and_blocks_past_the_first() -> None:
    vectors = outlying(4, 600, 320)
    vectors[:, 7] = 0
    moments = Moments()
    moments.add(vectors)
    weight = torch.randn(8, 320, generator=torch.Generator().manual_seed(2))
    scheme = Scheme(4, 32)

    def lost(made: Quantized) -> float:
        return float((vectors @ (dequantize(made.q, made.scale, None, 32) - weight).t()).square().sum())

    made = gptq(weight, moments.second, scheme)
    assert bool(made.scale.isfinite().all())
    assert not made.q[:, 7].any()
    assert lost(made) < 0.7 * lost(quantize(weight, scheme))


def with_outliers(folder: Path) -> ModelSource:
    """A Llama in which a few channels that products read are far larger than the others, as in models that have learnt."""
    save_random(TYPES["llama"], folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith("layernorm.weight"):
            value[torch.arange(0, len(value), 13)] *= 15
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = value / 5
    save_file(tensors, path, {"format": "pt"})
    return ModelSource.resolve(str(folder), scratch=folder)


def logits_of(eager: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = eager(torch.tensor(rows)).logits
        return logits


def test_awq_and_gptq_keep_more_of_a_model_with_outlying_channels(tmp_path: Path) -> None:
    source = with_outliers(tmp_path)
    trace = causal_lm.trace(source)
    unseen = samples(900)
    original = logits_of(source.load_eager(), unseen)
    lost = {}
    for method in METHODS:
        model = trace.copy()
        model.samples = samples(0, rows=32)
        passes.run_one(QuantizeWeights(method=method, group=16), model)  # type: ignore[arg-type]
        rounded = logits_of(with_weights(source.load_eager(), model.replaced), unseen)
        lost[method] = float((rounded - original).square().mean())
    assert lost["awq"] < 0.8 * lost["nearest"]
    assert lost["gptq"] < 0.8 * lost["nearest"]


def test_integers_are_made_anew_or_kept_but_scales_belong_to_them() -> None:
    # Scales are asked for before the integers and after: they are those of the same rounding.
    weight = traced("llama").weights["model.layers.0.mlp.up_proj.weight"]
    scheme = replace(Scheme(), symmetric=False, group=16)
    parts = QuantizedWeight(weight, scheme, partial(quantize, scheme=scheme)).parts()
    made = quantize(weight.read(), scheme)
    assert made.zero_point is not None
    for name in ("scale", "q", "zero_point", "scale"):
        assert torch.equal(parts[name].read(), getattr(made, name))


def test_weights_that_are_rounded_to_nearest_are_made_some_rows_at_a_time() -> None:
    """As one block of memory after the other: neither integers nor what they stand for need the whole weight."""
    model = traced("llama")
    passes.run([QuantizeWeights(group=16), CacheDynamic(), PackWeights()], model)
    assert [name for name, weight in model.weights.entries.items() if name.endswith(".packed") and not weight.by_rows] == []
    assert [name for name, weight in model.replaced.items() if not weight.by_rows] == []


FP8 = QuantizeWeights(**QUANTIZED["fp8"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_products_of_precision_fp8_read_e4m3_and_tables_heads_and_routers_stay(name: str) -> None:
    model = traced(name)
    done = passes.run_one(FP8, model)
    assert done.count == len(integers(model)) > 7
    assert {weight.dtype for weight in integers(model).values()} == {torch.float8_e4m3fn}
    assert set(stored_as(model).values()) == {"fp8"}
    assert not [key for key in integers(model) if "embed" in key or "wte" in key or "lm_head" in key or ".gate.weight" in key]
    assert model.rounding == {}
    inputs = prompt(model, 9)
    expected = eager_logits(source_of(name), model, inputs)
    assert np.abs(answers(model, inputs)["logits"] - expected).max() <= 1e-5 * expected.std()
    code = str(model.graph)
    assert passes.run_one(FP8, model).count == 0
    assert str(model.graph) == code


def test_a_number_of_eight_bits_weighs_one_byte() -> None:
    model, before = traced("llama"), traced("llama")
    passes.run_one(FP8, model)
    [layer] = [group for group in weights_by_layer(model) if group["name"] == "model.layers.0"]
    shapes = [weight.shape for name, weight in before.weights.entries.items() if name.startswith("model.layers.0.") and name.count("_proj")]
    norms = sum(weight.shape[0] for name, weight in before.weights.entries.items() if name.startswith("model.layers.0.") and "norm" in name)
    stored = 2 if "bfloat16" in str(before.weights["model.layers.0.input_layernorm.weight"].read().dtype) else 4
    assert layer["bytes"] == sum(rows * columns + 4 * rows for rows, columns in shapes) + stored * norms


def test_overrides_know_fp8_whatever_the_rest_is() -> None:
    model = traced("llama")
    overrides: Any = {"*down_proj*": "fp8", "*layers.0.mlp.up*": "keep"}
    passes.run_one(QuantizeWeights(symmetric=False, overrides=overrides), model)
    stored = stored_as(model)
    assert {stored[name] for name in stored if "down_proj" in name} == {"fp8"}
    assert stored["model.layers.1.mlp.up_proj.weight"] == "int4"
    made = model.weights["model.layers.0.mlp.down_proj.weight.scale"]
    assert made.shape == (model.weights["model.layers.0.mlp.down_proj.weight.q"].shape[0], 1)
    assert "model.layers.0.mlp.down_proj.weight.zero_point" not in model.weights


def test_e4m3_in_four_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="e4m3 has 8 bits; found bits: 4"):
        QuantizeWeights(format="e4m3")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibrated_methods_round_to_e4m3_too(method: Any) -> None:
    model = calibrated("llama")
    passes.run_one(replace(FP8, method=method), model)
    assert {weight.dtype for weight in integers(model).values()} == {torch.float8_e4m3fn}
    inputs = prompt(model, 9)
    expected = eager_logits(source_of("llama"), model, inputs)
    assert np.abs(answers(model, inputs)["logits"] - expected).max() <= 1e-5 * expected.std()
