from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calque.passes.fuse_gelu import FuseGelu
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import prompt, traced

WIDE, DEEP = math.sqrt(2 / math.pi), 0.044715
TANH, ERF, SILU, QUICK = ("gelu-tanh", "gelu", "aten.silu.default", "calque.quick_gelu.default")
X = torch.linspace(-6, 6, 48).reshape(2, 3, 8)
INPUTS = {"x": X, "y": X.flip(0) * 0.25 + 1}


@pytest.mark.parametrize(("name", "operator", "count"), [("gpt2", TANH, 2), ("bloom", TANH, 2), ("gpt_oss", QUICK, 2)])
def test_every_activation_of_a_model_is_one_operator(name: str, operator: str, count: int) -> None:
    model = traced(name)
    done = check_pass(FuseGelu(), model, prompt(model))
    assert (done.count, done.skipped) == (count, ())
    left = histogram(model)
    assert left["aten.gelu.default" if operator == TANH else operator] == count
    assert left["aten.tanh.default"] == left["aten.sigmoid.default"] == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_model_whose_activation_is_one_operator_is_left_alone(name: str) -> None:
    assert left_alone(FuseGelu(), traced(name)) == set()


class Activation(nn.Module):
    """One of the forms below, on a value that is itself computed."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (self.form(x + y, y),)


FORMS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "new": (TANH, lambda x, y: 0.5 * x * (1.0 + torch.tanh(WIDE * (x + DEEP * torch.pow(x, 3.0))))),
    "fast": (TANH, lambda x, y: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + DEEP * x * x)))),
    "bloom": (TANH, lambda x, y: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + DEEP * x * x)))),
    "half-last": (TANH, lambda x, y: (x * (torch.tanh(WIDE * (x + DEEP * x**3)) + 1)) * 0.5),
    "half-by-division": (TANH, lambda x, y: x * (torch.tanh(WIDE * (x + DEEP * x**3)) + 1) / 2),
    "gate-of-another": (TANH, lambda x, y: 0.5 * x * (1.0 + torch.tanh(WIDE * (x + DEEP * x * x * x))) * y),
    "of-a-product": (TANH, lambda x, y: (lambda z: 0.5 * z * (1.0 + torch.tanh(WIDE * (z + DEEP * z**3))))(2.0 * x)),
    "exact": (ERF, lambda x, y: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "exact-by-product": (ERF, lambda x, y: 0.5 * x * (1.0 + torch.erf(x * 0.7071067811865475))),
    "silu": (SILU, lambda x, y: x * torch.sigmoid(x)),
    "silu-of-another": (SILU, lambda x, y: torch.sigmoid(x) * x * y),
    "quick": (QUICK, lambda x, y: x * torch.sigmoid(1.702 * x)),
}


@pytest.mark.parametrize("form", FORMS)
def test_form_becomes_the_operator_it_means(form: str) -> None:
    operator, function = FORMS[form]
    model = small(Activation(function), INPUTS, {})
    done = check_pass(FuseGelu(), model, arrays(INPUTS))
    assert (done.count, done.skipped) == (1, ())
    found = [node for node in model.graph.nodes if "gelu" in str(node.target) or "silu" in str(node.target)]
    assert [str(node.target) for node in found] == ["aten.gelu.default" if operator in (TANH, ERF) else operator]
    if operator in (TANH, ERF):
        assert found[0].kwargs.get("approximate", "none") == ("tanh" if operator == TANH else "none")
    if operator == QUICK:
        assert found[0].args[1] == 1.702


OTHERS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "another-cubic": ("its polynomial", lambda x, y: 0.5 * x * (1.0 + torch.tanh(WIDE * (x + 0.05 * x**3)))),
    "no-cubic": ("its polynomial", lambda x, y: 0.5 * x * (1.0 + torch.tanh(WIDE * x))),
    "exact-without-root": ("its polynomial", lambda x, y: 0.5 * x * (1.0 + torch.erf(x))),
    "whole": ("it is multiplied", lambda x, y: x * (1.0 + torch.tanh(WIDE * (x + DEEP * x**3))) + y),
    "half-of-another": ("it is multiplied", lambda x, y: 0.5 * y * (1.0 + torch.tanh(WIDE * (x + DEEP * x**3)))),
}


@pytest.mark.parametrize("form", OTHERS)
def test_what_only_begins_as_one_is_left_and_the_reason_given(form: str) -> None:
    reason, function = OTHERS[form]
    (given,) = left_alone(FuseGelu(), small(Activation(function), INPUTS, {}))
    assert given.startswith(reason)


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate-of-another": lambda x, y: y * torch.sigmoid(x),
    "shifted": lambda x, y: x * torch.sigmoid(x + 1.0),
    "turned": lambda x, y: x * torch.sigmoid(-1.0 * x),
    "read-twice": lambda x, y: (lambda gate: x * gate + gate)(torch.sigmoid(x)),
    "cap": lambda x, y: torch.tanh(x / 30.0) * 30.0,
}


@pytest.mark.parametrize("form", GATES)
def test_gate_or_cap_is_no_activation_and_is_not_mentioned(form: str) -> None:
    assert left_alone(FuseGelu(), small(Activation(GATES[form]), INPUTS, {})) == set()
