from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from calque import passes
from calque.choices import NARROW, QUANTIZED, NarrowType
from calque.errors import UsageError
from calque.passes import Pass
from calque.passes.cast_precision import CastPrecision
from calque.passes.lay_out_integers import LayOutIntegers
from calque.passes.quantize_activations import QuantizeActivations
from calque.passes.quantize_weights import QuantizeWeights
from calque.quantized_ops import RoundTrip
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel
from calque.validation.eager import with_weights
from calque.weights import Derived, Weight
from tests.passes.check_pass import check_pass
from tests.passes.small_graphs import small
from tests.tiny_models import TYPES, answers, prompt, shared_trace, source_of, traced

aten = torch.ops.aten
# How far the narrow arithmetic of two or three layers may lie from float32, weights rounded too, in σ.
ROUNDINGS: dict[NarrowType, float] = {"float16": 0.1, "bfloat16": 0.8}


def joined(name: str) -> TracedModel:
    """The model as the target's other passes leave it."""
    model = traced(name)
    passes.run(OnnxRuntime().passes("fp32"), model)
    return model


def dtype_of(node: Node) -> Any:
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else None


class Types(Interpreter):
    """Compares the type that each node is said to have with the one that it has when it runs."""

    def __init__(self, model: TracedModel) -> None:
        super().__init__(model.module)
        self.lies: list[str] = []

    def run_node(self, n: Node) -> Any:
        value: Any = super().run_node(n)
        said: Any = n.meta.get("val")
        pairs = zip(value, said, strict=True) if isinstance(value, tuple | list) and n.op == "call_function" else [(value, said)]
        self.lies += [f"{n.name}: {b.dtype}, is {a.dtype}" for a, b in pairs if isinstance(a, Tensor) and a.dtype != b.dtype]
        return value


def false_types(model: TracedModel, inputs: dict[str, Any]) -> list[str]:
    """The nodes whose value is of another type than the graph says."""
    types = Types(model)
    feeds = [torch.from_numpy(inputs[spec.name].copy()).to(getattr(torch, spec.dtype)) for spec in model.inputs]
    with torch.no_grad():
        types.run(*model.bind(), *feeds)
    return types.lies


@pytest.mark.parametrize("dtype", NARROW.values())
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_weights_and_states_are_narrow_and_the_logits_are_not(name: str, dtype: NarrowType) -> None:
    model = joined(name)
    unique = {id(weight) for weight in model.weights.entries.values()}
    done = check_pass(CastPrecision(dtype), model, prompt(model), ROUNDINGS[dtype])
    assert done.count == len(unique) + len(model.states)
    narrow = getattr(torch, dtype)
    assert {dtype_of(node) for node in model.parameters().values()} == {narrow}
    assert {state.dtype for state in model.states} == {dtype}
    kept = {state.input for state in model.states} | {state.output for state in model.states}
    assert {spec.dtype for spec in (*model.inputs, *model.outputs) if spec.name in kept} == {dtype}
    assert model.outputs[0].dtype == "float32"
    products = [node for node in model.graph.nodes if node.target in (aten.matmul.default, aten.linear.default, aten.addmm.default)]
    assert {dtype_of(node) for node in products} == {narrow}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "bloom", "gemma3_text"])
def test_each_value_is_of_the_type_that_the_graph_says(name: str) -> None:
    for dtype in NARROW.values():
        model = joined(name)
        inputs = prompt(model)
        passes.run([CastPrecision(dtype)], model)
        assert false_types(model, inputs) == []


@pytest.mark.parametrize("plan", [(), tuple(OnnxRuntime("standard").passes("fp32"))[:2]], ids=["as-traced", "before-the-cache"])
def test_it_may_stand_anywhere(plan: tuple[Pass, ...]) -> None:
    model = traced("qwen3")
    passes.run(plan, model)
    inputs = prompt(model)
    check_pass(CastPrecision(), model, inputs, ROUNDINGS["float16"])
    assert false_types(model, inputs) == []


def test_tied_weights_stay_one() -> None:
    model = joined("gemma2")
    tied = [name for name in model.weights.entries if model.weights.tied(name)]
    before = model.weights.nbytes()
    passes.run([CastPrecision()], model)
    assert [name for name in model.weights.entries if model.weights.tied(name)] == tied
    assert model.weights.nbytes() * 2 == before


def test_weights_are_read_one_by_one_as_they_are_cast() -> None:
    model = joined("llama")
    name = "model.layers.0.mlp.up_proj.weight.transposed"
    whole = model.weights[name].read()
    passes.run([CastPrecision()], model)
    weight = model.weights[name]
    assert isinstance(weight, Derived)
    assert (weight.operation, weight.dtype) == ("cast(float16)", "float16")
    assert torch.equal(weight.read(), whole.half())


def test_angles_are_computed_in_float32_whatever_turns_by_them() -> None:
    model = joined("qwen3")
    passes.run([CastPrecision()], model)
    waves = [node for node in model.graph.nodes if node.target in (aten.cos.default, aten.sin.default)]
    assert waves
    assert {dtype_of(node) for wave in waves for node in (wave, *wave.all_input_nodes)} == {torch.float32}
    turns = [node for node in model.graph.nodes if node.target is torch.ops.calque.flat_rotary.default]
    assert {dtype_of(part) for turn in turns for part in turn.all_input_nodes} == {torch.float16}


@pytest.mark.parametrize(("name", "operator"), [("llama", "padding_bias"), ("mixtral", "mask_bias")])
def test_what_hides_keys_is_the_lowest_number_of_the_type_and_not_infinity(name: str, operator: str) -> None:
    model = joined(name)
    passes.run([CastPrecision()], model)
    biases = [node for node in model.graph.nodes if node.target is getattr(torch.ops.calque, operator).default]
    assert [node.args[-1] for node in biases] == [torch.float16]
    hidden = torch.ops.calque.mask_bias(torch.tensor([True, False]), torch.float16)
    assert hidden.tolist() == [0.0, -65504.0]
    row = torch.ops.calque.padding_bias(torch.tensor([[True, False]]), torch.zeros(1, 3), torch.float16)
    assert row.tolist() == [[[hidden.tolist()] * 3]]


def test_choice_of_experts_is_made_by_float32_products() -> None:
    model = joined("mixtral")
    done = passes.run_all([CastPrecision()], model)["cast_precision"]
    chosen = [node for node in model.graph.nodes if node.target is aten.topk.default]
    assert {dtype_of(node.all_input_nodes[0]) for node in chosen} == {torch.float32}
    routers = [name for name, why in done.skipped if why == "a choice is made by it"]
    assert len(routers) >= TYPES["mixtral"].layers
    products = {node.name for node in model.graph.nodes if node.target is aten.matmul.default and dtype_of(node) == torch.float32}
    assert len(products) == TYPES["mixtral"].layers
    assert products <= set(routers)


def _rounded(weight: Weight, dtype: torch.dtype) -> Derived:
    return Derived((weight,), "round", lambda tensor: tensor.to(dtype).float(), "float32", weight.shape)


@pytest.mark.parametrize("dtype", NARROW.values())
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_with_float32_arithmetic_nothing_but_the_weights_is_rounded(name: str, dtype: NarrowType) -> None:
    narrow = getattr(torch, dtype)
    model, rounded = joined(name), traced(name)
    inputs = prompt(model)
    made = {id(entry): _rounded(entry, narrow) for entry in rounded.weights.entries.values()}
    rounded.weights.entries = {weight: made[id(entry)] for weight, entry in rounded.weights.entries.items()}
    passes.run(OnnxRuntime().passes("fp32"), rounded)
    wanted = answers(rounded, inputs)
    done = check_pass(CastPrecision(dtype, "float32"), model, inputs, ROUNDINGS[dtype])
    assert done.skipped == ()
    assert {state.dtype for state in model.states} == {"float32"}
    got = answers(model, inputs)
    for output, array in wanted.items():
        assert np.abs(array - got[output]).max() <= 1e-6 * array.std(), output
    assert false_types(model, inputs) == []


class Wide(nn.Module):
    """What a type of five bits of exponent cannot hold: squares, a mask's lowest number, a divisor next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        product = nn.functional.linear(x, self.weight)
        norm = product * torch.rsqrt((product * product).mean(-1, keepdim=True) + 1e-6)
        seen = product.masked_fill(x > 250.0, torch.finfo(torch.float32).min).softmax(-1)
        alike = product * 0.0 / (product.abs().amin(-1, keepdim=True) * 0.0 + 1e-9)
        return tuple(nn.functional.linear(part, self.weight) for part in (norm, seen, alike))


def test_what_the_type_cannot_hold_is_computed_in_float32() -> None:
    x = torch.tensor([[300.0, -200.0, 100.0, 260.0], [1e-3, 2e-3, 3e-3, 4e-3]])
    model = small(Wide(), {"x": x}, {})
    wanted = [output.numpy() for output in Wide().requires_grad_(False)(x)]
    done = passes.run_all([CastPrecision()], model)["cast_precision"]
    for got, array in zip(answers(model, {"x": x.numpy()}).values(), wanted, strict=True):
        np.testing.assert_allclose(got, array, rtol=2e-3, atol=1e-6)
    whys = " ".join(why for _, why in done.skipped)
    assert "leave the range" in whys
    assert "the narrow type cannot hold -3.40282e+38" in whys
    assert "the narrow type cannot hold 1e-09" in whys


class Slopes(nn.Module):
    """Scores with a bias by position, as ALiBi has it, and a buffer that a choice is corrected by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.slope: Tensor
        self.register_buffer("slope", torch.tensor([1.0001, 1.0002, 1.0003, 1.0004]))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor]:
        return (nn.functional.linear(x, self.weight) + positions[:, None].float() * self.slope,)


def test_positions_are_told_apart_however_far_they_are() -> None:
    inputs = {"x": torch.ones(2, 4), "positions": torch.tensor([4001, 4002])}
    model = small(Slopes(), inputs, {})
    wanted = Slopes().requires_grad_(False)(*inputs.values())[0].numpy()
    passes.run([CastPrecision()], model)
    [got] = answers(model, {name: tensor.numpy() for name, tensor in inputs.items()}).values()
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert [name for name in model.program.state_dict if name == "slope"] == ["slope"]
    assert model.constant("slope").dtype == torch.float32


def test_plan_that_stores_weights_otherwise_than_the_precision_says_is_refused() -> None:
    wanted = OnnxRuntime().passes("fp16")
    passes.check_precision("fp16", wanted, wanted)
    with pytest.raises(UsageError, match="precision: fp16 and the list of passes disagree"):
        passes.check_precision("fp16", [], wanted)
    with pytest.raises(UsageError) as caught:
        passes.check_precision("fp32", wanted, OnnxRuntime().passes("fp32"))
    assert caught.value.fix == "its list takes no cast_precision"


def test_shared_trace_is_never_changed() -> None:
    joined("llama")
    assert {state.dtype for state in shared_trace("llama").states} == {"float32"}


INTEGERS: dict[str, tuple[Pass, ...]] = {
    "int8": (QuantizeWeights(**QUANTIZED["int8"]),),
    "int4": (QuantizeWeights(symmetric=False),),
    "int8-static": (QuantizeActivations("static", symmetric=True), QuantizeWeights(**QUANTIZED["int8"])),
    "fp8": (QuantizeActivations("auto", format="e4m3"), QuantizeWeights(**QUANTIZED["fp8"])),
    "dynamic": (QuantizeActivations(), QuantizeWeights(**QUANTIZED["int8"])),
}


def of_integers(name: str, plan: tuple[Pass, ...], *later: Pass) -> TracedModel:
    model = traced(name)
    model.samples = ((5, 6, 7, 8, 9, 10, 11),)
    passes.run([*plan, *later], model)
    return model


@pytest.mark.parametrize(
    ("kind", "later"),
    [("int8", ()), ("fp8", ()), ("int4", (LayOutIntegers(),)), *((kind, (LayOutIntegers("numbers"),)) for kind in INTEGERS)],
    ids=str,
)
def test_integers_are_multiplied_in_the_narrow_type_and_stay_what_they_are(kind: str, later: tuple[Pass, ...]) -> None:
    model = of_integers("llama", INTEGERS[kind], *later)
    inputs = prompt(model)
    kept = {name: weight for name, weight in model.weights.entries.items() if model.parameters()[name].meta["val"].dtype != torch.float32}
    # A value next to the middle of two that 8 bits hold may be rounded to either.
    check_pass(CastPrecision(), model, inputs, 0.8 if len(INTEGERS[kind]) > 1 else ROUNDINGS["float16"])
    assert false_types(model, inputs) == []
    assert {name: model.weights[name] for name in kept} == kept
    linears = [node for node in model.graph.nodes if node.target in (aten.matmul.default, aten.linear.default)]
    # The angles are a product too.
    assert {dtype_of(node) for node in linears if dtype_of(node.args[1]) != torch.float32} <= {torch.float16}
    assert sum(dtype_of(node) == torch.float16 for node in linears) >= (0 if kind == "dynamic" and later else 15)


@pytest.mark.parametrize("dtype", NARROW.values())
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_replaced_weights_are_those_of_the_narrow_scales(name: str, dtype: NarrowType) -> None:
    model = of_integers(name, INTEGERS["int8"], LayOutIntegers("numbers"))
    before = {key: weight.read() for key, weight in model.replaced.items()}
    passes.run([CastPrecision(dtype)], model)
    narrow, key = getattr(torch, dtype), next(key for key in before if "down_proj" in key or "c_proj" in key)
    q = model.weights[f"{key}.q.transposed"].read().float()
    scale = model.weights[f"{key}.scale.each"].read()
    assert scale.dtype == narrow
    numbers = q * scale.float()
    after = model.replaced[key].read()
    assert torch.equal(after, numbers if name == "gpt2" else numbers.t())
    assert not torch.equal(after, before[key])
    assert torch.equal(model.replaced[key].read_rows(3, 5), after[3:5])
    table = next(key for key in model.weights.entries if key.endswith(".numbers"))
    assert torch.equal(model.weights[table].read(), model.replaced[table.removesuffix(".numbers")].read().to(narrow))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_narrow_graph_computes_what_eager_does_with_the_replaced_weights(name: str) -> None:
    model = of_integers(name, INTEGERS["int8"], LayOutIntegers("numbers"), CastPrecision("bfloat16"))
    inputs = prompt(model, 9)
    eager = with_weights(source_of(name).load_eager(), model.replaced)
    with torch.no_grad():
        expected = eager(torch.tensor(inputs["input_ids"])).logits.numpy()
    assert np.abs(answers(model, inputs)["logits"] - expected).max() < 0.3 * expected.std()


def test_what_the_gate_rounds_by_has_the_narrow_scale() -> None:
    model = of_integers("llama", INTEGERS["int8-static"])
    before = dict(model.rounding)
    passes.run([CastPrecision()], model)
    for name, made in model.rounding.items():
        was = before[name]
        if isinstance(made, RoundTrip) and isinstance(was, RoundTrip):
            assert torch.equal(made.scale, was.scale.half())
    assert sum(isinstance(made, RoundTrip) for made in model.rounding.values()) == 15


def test_scales_stay_float32_where_arithmetic_does() -> None:
    model = of_integers("llama", INTEGERS["int8"], LayOutIntegers("numbers"))
    inputs, replaced = prompt(model), dict(model.replaced)
    scales = {name: weight for name, weight in model.weights.entries.items() if ".scale" in name or name.endswith(".numbers")}
    check_pass(CastPrecision(arithmetic="float32"), model, inputs, ROUNDINGS["float16"])
    assert {name: model.weights[name] for name in scales} == scales
    assert model.replaced == replaced
