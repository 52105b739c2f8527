from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calque import passes
from calque.activation_ranges import ActivationRange, Method, steps
from calque.calibration import observe
from calque.errors import UsageError
from calque.passes.quantize_activations import QuantizeActivations
from calque.quantization import round_e4m3
from calque.quantized_ops import RoundTrip, dynamic_range
from calque.traced import TracedModel, user_nodes
from tests.passes.check_pass import histogram
from tests.tiny_models import VOCABULARY, answers, prompt, traced

calque = torch.ops.calque
STATIC = QuantizeActivations("static")
ROWS = tuple(tuple(row) for row in np.random.default_rng(5).integers(3, VOCABULARY, (3, 24)).tolist())


def calibrated(name: str) -> TracedModel:
    model = traced(name)
    model.samples = ROWS
    return model


def test_dynamic_range_reaches_from_smallest_to_largest_and_over_zero() -> None:
    x = torch.tensor([[-1.0, 0.25], [0.5, 1.55]])
    scale, zero = dynamic_range(x)
    assert scale == pytest.approx(2.55 / 255)
    assert zero == 100
    assert torch.allclose(calque.round_activations(x), x, atol=float(scale) / 2)
    scale, zero = dynamic_range(torch.tensor([2.0, 5.1]))
    assert float(scale) == pytest.approx(5.1 / 255)
    assert float(zero) == 0
    assert torch.equal(calque.round_activations(torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_dynamic_mode_rounds_what_every_product_with_a_weight_multiplies(name: str) -> None:
    model = traced(name)
    before = answers(model, prompt(model))["logits"]
    done = passes.run_one(QuantizeActivations(), model)
    rounded = user_nodes(model.graph.nodes, calque.round_activations.default)
    assert sum(len(node.users) for node in rounded) == done.count
    assert (done.count > len(rounded)) == (name != "gpt2")  # what several products read is rounded once
    off = np.abs(answers(model, prompt(model))["logits"] - before).max() / before.std()
    assert 1e-3 < off < 0.5


@pytest.mark.parametrize("pass_", [QuantizeActivations(), STATIC], ids=["dynamic", "static"])
def test_second_run_changes_nothing(pass_: QuantizeActivations) -> None:
    model = calibrated("llama")
    assert passes.run_one(pass_, model).count > 0
    code = str(model.graph)
    assert passes.run_one(pass_, model).count == 0
    assert str(model.graph) == code


@pytest.mark.parametrize(
    ("name", "weight"), [("llama", "model.layers.1.mlp.down_proj.weight"), ("gpt2", "transformer.h.1.mlp.c_proj.weight")]
)
def test_static_range_is_that_of_the_text(name: str, weight: str) -> None:
    model, seen = calibrated(name), []

    def keep(found: str, x: Tensor) -> None:
        if found == weight:
            seen.append(x)

    observe(model, ROWS, keep)
    met = torch.cat([x.flatten() for x in seen])
    assert len(met) == 72 * traced(name).weights[weight].shape[0 if name == "gpt2" else 1]
    passes.run_one(QuantizeActivations("static", "minmax"), model)
    scale, zero, _, _ = steps(min(0.0, float(met.min())), max(0.0, float(met.max())), symmetric=False)
    assert float(model.weights[f"{weight}.input_scale"].read()) == pytest.approx(scale)
    held = model.weights[f"{weight}.input_zero_point"].read()
    assert (held.dtype, int(held)) == (torch.uint8, zero)


@pytest.mark.parametrize("symmetric", [False, True])
def test_static_mode_changes_little_and_not_with_the_batch(symmetric: bool) -> None:
    model = calibrated("llama")
    inputs = prompt(model)
    before = answers(model, inputs)["logits"]
    passes.run_one(QuantizeActivations("static", symmetric=symmetric), model)
    both = answers(model, inputs)["logits"]
    assert 1e-3 < np.abs(both - before).max() / before.std() < 0.7
    alone = answers(model, {name: array[:1] for name, array in inputs.items()})["logits"]
    assert np.abs(both[:1] - alone).max() < 0.02 * before.std()
    dtypes = {node.meta["val"].dtype for node in user_nodes(model.graph.nodes, calque.quantize_linear.default)}
    assert dtypes == {torch.int8 if symmetric else torch.uint8}


def test_static_mode_without_text_says_how_to_name_one() -> None:
    with pytest.raises(UsageError, match="measured on text") as raised:
        STATIC.apply(traced("llama"))
    assert "--calibration" in str(raised.value)


def test_kept_products_are_named_and_left() -> None:
    model = traced("llama")
    done = passes.run_one(QuantizeActivations(keep=("lm_head.*", "*.down_proj.weight")), model)
    assert sorted(name for name, _ in done.skipped) == ["lm_head.weight", *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(2))]
    assert histogram(model)["calque.round_activations.default"] == 6  # two before attention, two after, two of gates


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"percentile": 50.0}, "percentile"),
        ({"mode": "dynamic", "symmetric": True}, "mode: static"),
        ({"format": "e4m3"}, "mode: static or auto"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QuantizeActivations(**options)


def heavy_tails() -> Tensor:
    """Values of which a few lie far out, as in front of a model's down projections."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    x[:, 7] *= 60
    return x


def seen_range(*parts: Tensor) -> ActivationRange:
    made = ActivationRange()
    for part in parts:
        made.add(part)
    return made


def e4m3_error(x: Tensor, bounds: tuple[float, float]) -> float:
    scale = steps(*bounds, symmetric=True, format="e4m3")[0]
    return float((round_e4m3(x / scale) * scale - x).square().mean())


def error(x: Tensor, bounds: tuple[float, float], symmetric: bool = False) -> float:
    scale, zero, smallest, largest = steps(*bounds, symmetric)
    return float((((x / scale).round() + zero).clamp(smallest, largest).sub(zero).mul(scale) - x).square().mean())


def test_histogram_grows_with_what_it_meets_and_loses_nothing() -> None:
    x = heavy_tails()
    counted = seen_range(x[:16] / 1000, x[16:32], x[32:])
    assert counted.counts.sum() == x.numel()
    assert counted.reach >= max(-counted.low, counted.high) > counted.reach / 2
    whole = seen_range(torch.cat([x[:16] / 1000, x[16:]]))
    assert (counted.low, counted.high, counted.reach) == (whole.low, whole.high, whole.reach)
    assert torch.equal(counted.counts, whole.counts)


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile_is_that_of_the_values(percentile: float) -> None:
    x = heavy_tails()
    low, high = seen_range(x).bounds("percentile", percentile)
    flat = x.flatten().sort().values
    tail = int((1 - percentile / 100) * len(flat))
    bar = 2 * seen_range(x).reach / 8192
    assert low == pytest.approx(float(flat[tail]), abs=2 * bar)
    assert high == pytest.approx(float(flat[-tail - 1]), abs=2 * bar)


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_leaves_less_error_than_the_whole_range(symmetric: bool) -> None:
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(3))
    x[0, 0], x[1, 1] = 12.0, -9.0
    counted = seen_range(x)
    errors = {method: error(x, counted.bounds(method, 99.99, symmetric), symmetric) for method in ("minmax", "mse")}
    assert errors["mse"] < 0.6 * errors["minmax"]
    for percentile in (99.9, 99.99, 99.999):
        assert errors["mse"] <= 1.02 * error(x, counted.bounds("percentile", percentile, symmetric), symmetric)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_zero_is_always_an_integer(method: Method) -> None:
    low, high = seen_range(torch.rand(8, 8) + 3).bounds(method, 99.0)
    assert low == 0 < high
    assert steps(low, high, symmetric=False)[1] == 0
    assert steps(*ActivationRange().bounds(method), symmetric=False) == (1.0, 0, 0, 255)


def test_range_of_e4m3_is_the_largest_number_and_mse_clips_where_that_helps() -> None:
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(3)).abs()
    x[0, 0] = 2000.0
    counted = seen_range(x)
    assert steps(*counted.bounds("minmax", symmetric=True), symmetric=True, format="e4m3") == (2000.0 / 448, 0, -448, 448)
    low, high = counted.bounds("percentile", 99.9, symmetric=True)
    assert low == -high
    # Digits are as many wherever the range ends, so that little is won but by clipping; nothing is lost.
    whole, best = counted.bounds("minmax", symmetric=True), counted.bounds("mse", symmetric=True, format="e4m3")
    assert e4m3_error(x, best) <= e4m3_error(x, whole) * 1.01
    assert steps(*ActivationRange().bounds("mse", symmetric=True, format="e4m3"), symmetric=True, format="e4m3")[0] == 1.0


E4M3 = QuantizeActivations("auto", format="e4m3")


def test_auto_rounds_where_there_is_a_text_and_asks_for_none() -> None:
    model = traced("llama")
    assert not E4M3.calibrated
    assert passes.run_one(E4M3, model).count == 0
    assert model.rounding == {}
    model = calibrated("llama")
    done = passes.run_one(E4M3, model)
    assert done.count == len(model.rounding) == 15
    code = str(model.graph)
    assert passes.run_one(E4M3, model).count == 0
    assert str(model.graph) == code


@pytest.mark.parametrize("pass_", [E4M3, QuantizeActivations("static", symmetric=True), STATIC], ids=["e4m3", "int8", "uint8"])
def test_what_the_gate_rounds_by_is_what_the_graph_does(pass_: QuantizeActivations) -> None:
    model = calibrated("llama")
    passes.run_one(pass_, model)
    name = "model.layers.1.mlp.down_proj.weight"
    rounding = model.rounding[name]
    assert isinstance(rounding, RoundTrip)
    scale, zero = (model.weights[f"{name}.input_{part}"].read() for part in ("scale", "zero_point"))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * 300 * float(scale)
    x[0, 0] = 1e6 * float(scale)
    expected = calque.dequantize_linear(calque.quantize_linear(x, scale, zero), scale, zero, 8, 0, 0)
    assert torch.equal(rounding(x), expected)
    assert not torch.equal(rounding(x), x)
    assert rounding(x).isfinite().all()
    narrow = rounding.narrowed(torch.float16)
    assert float(narrow.scale) == float(scale.half())
    assert narrow(x).dtype == torch.float32


def test_values_of_e4m3_change_the_answer_little_and_not_with_the_batch() -> None:
    model = calibrated("llama")
    inputs = prompt(model)
    before = answers(model, inputs)["logits"]
    passes.run_one(E4M3, model)
    both = answers(model, inputs)["logits"]
    assert 1e-3 < np.abs(both - before).max() / before.std() < 0.7
    dtypes = {node.meta["val"].dtype for node in user_nodes(model.graph.nodes, calque.quantize_linear.default)}
    assert dtypes == {torch.float8_e4m3fn}
