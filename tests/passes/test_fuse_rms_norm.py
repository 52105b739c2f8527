from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calque.passes.fuse_rms_norm import FuseRmsNorm
from calque.traced import TracedModel, user_nodes
from calque.weights import Derived
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import Tiny, prompt, traced, traced_as

OTHER = "its result multiplies something else than what was squared"
SIZE = 8


@pytest.mark.parametrize(
    ("name", "norms"),
    [("llama", 5), ("qwen3", 9), ("gemma2", 9), ("gemma3_text", 19), ("phi3", 5), ("gpt_oss", 5), ("mixtral", 5)],
)
def test_every_norm_of_a_model_is_one_operator(name: str, norms: int) -> None:
    model = traced(name)
    done = check_pass(FuseRmsNorm(), model, prompt(model))
    assert (done.count, done.skipped) == (norms, ())
    left = histogram(model)
    assert left["calque.rms_norm.default"] == norms
    assert left["aten.rsqrt.default"] == left["aten.pow.Tensor_Scalar"] == left["aten.mean.dim"] == 0


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom"])
def test_model_with_layer_norms_is_left_alone(name: str) -> None:
    assert left_alone(FuseRmsNorm(), traced(name)) == set()


def test_layer_norm_that_is_written_out_is_left_and_the_reason_given() -> None:
    assert left_alone(FuseRmsNorm(), traced_as(Tiny("cohere"))) == {OTHER}


def test_weight_that_a_model_adds_one_to_is_stored_with_it() -> None:
    model = traced("gemma2")
    plain = model.weights["model.layers.0.input_layernorm.weight"]
    check_pass(FuseRmsNorm(), model, prompt(model))
    weight = model.weights["model.layers.0.input_layernorm.weight.plus_one"]
    assert isinstance(weight, Derived)
    assert weight.sources == (plain,)
    assert torch.equal(weight.read(), plain.read().float() + 1)
    assert "model.layers.0.input_layernorm.weight" not in model.weights


class Norm(nn.Module):
    """Parameters to write norms with, and ``form`` of one."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(SIZE, generator=generator))
        self.matrix = nn.Parameter(torch.randn(3, SIZE, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made: Tensor = FORMS[self.form](x, y, self.weight, self.matrix)
        return made


def root(x: Tensor, axis: int = -1) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(axis, keepdim=True) + 1e-5)


def read_again(x: Tensor) -> Tensor:
    found = root(x)
    return x * found + found


FORMS: dict[str, Callable[..., Tensor]] = {
    "weight-before": lambda x, y, w, m: w * (x * root(x)),
    "weight-after": lambda x, y, w, m: (x * root(x)) * w,
    "root-before": lambda x, y, w, m: (root(x) * x) * w,
    "power": lambda x, y, w, m: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5) * w,
    "product": lambda x, y, w, m: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w,
    "one-and-weight": lambda x, y, w, m: (x * root(x)) * (1.0 + w),
    "weightless": lambda x, y, w, m: x * root(x) - y,
    "gated": lambda x, y, w, m: (x * root(x)) * y,
    "matrix": lambda x, y, w, m: (x * root(x)) * m,
    "two-and-weight": lambda x, y, w, m: (x * root(x)) * (2.0 + w),
    "read-twice": lambda x, y, w, m: x * root(x) * w + (x * root(x)),
    # What is no norm over the last axis:
    "another-axis": lambda x, y, w, m: w * (x * root(x, 1)),
    "another-square": lambda x, y, w, m: w * (x * root(y)),
    "twice-the-value": lambda x, y, w, m: w * (2 * x * root(x)),
    "another-product": lambda x, y, w, m: x * torch.rsqrt((x * y).mean(-1, keepdim=True) + 1e-5) * w,
    "cube": lambda x, y, w, m: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-5),
    "another-root": lambda x, y, w, m: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-5, -0.25),
    "sum": lambda x, y, w, m: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
    "root-read-again": lambda x, y, w, m: read_again(x),
}


def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(2, 3, SIZE, generator=generator) for name in ("x", "y")}


def norm(form: str) -> TracedModel:
    return small(Norm(form), given(), {})


@pytest.mark.parametrize("form", ["weight-before", "weight-after", "root-before", "power", "product", "one-and-weight"])
def test_written_form_is_one_operator_with_its_weight(form: str) -> None:
    model = norm(form)
    assert check_pass(FuseRmsNorm(), model, arrays(given())).count == 1
    (fused,) = user_nodes(model.graph.nodes, torch.ops.calque.rms_norm.default)
    name = {node: name for name, node in model.parameters().items()}[fused.args[1]]  # type: ignore[index]
    assert name == ("weight.plus_one" if form == "one-and-weight" else "weight")
    assert fused.args[2] == 1e-5
    assert histogram(model).total() == 1


@pytest.mark.parametrize("form", ["weightless", "gated", "matrix", "two-and-weight"])
def test_norm_without_a_vector_of_parameters_has_no_weight(form: str) -> None:
    model = norm(form)
    assert check_pass(FuseRmsNorm(), model, arrays(given())).count == 1
    (fused,) = user_nodes(model.graph.nodes, torch.ops.calque.rms_norm.default)
    assert fused.args[1] is None
    assert list(fused.users) != []


def test_norm_with_and_norm_without_weight_of_one_value_are_two_operators() -> None:
    model = norm("read-twice")
    assert check_pass(FuseRmsNorm(), model, arrays(given())).count == 2
    fused = user_nodes(model.graph.nodes, torch.ops.calque.rms_norm.default)
    assert [node.args[1] is None for node in fused] == [False, True]


@pytest.mark.parametrize(
    ("form", "reasons"),
    [
        ("another-axis", set()), ("another-square", {OTHER}), ("twice-the-value", {OTHER}), ("another-product", set()), ("cube", set()),
        ("another-root", set()), ("sum", set()), ("root-read-again", {OTHER}),
    ],
)  # fmt: skip
def test_what_is_nearly_a_norm_is_left_alone(form: str, reasons: set[str]) -> None:
    assert left_alone(FuseRmsNorm(), norm(form)) == reasons
