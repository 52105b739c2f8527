from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calque.passes.merge_gate_up import MergeGateUp
from calque.traced import user_nodes
from calque.weights import Derived
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import prompt, traced

INPUTS = {"x": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))}
AXES = {"x": {0: "batch", 1: "sequence"}}
APART, VALUES = "its gate and values are not two products as they come out", "its gate and values are products of different values"
BIASES, TIED = "some of its products have a bias, and some have none", "its weights are tied, or read by other operators too"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_each_layer_of_a_model_has_one_product_less(name: str) -> None:
    model = traced(name)
    gate, up = (model.weights[f"model.layers.0.mlp.{kind}_proj.weight"] for kind in ("gate", "up"))
    before, held = histogram(model)["aten.linear.default"], model.weights.nbytes()
    done = check_pass(MergeGateUp(), model, prompt(model))
    assert (done.count, done.skipped) == (2, ())
    assert histogram(model)["aten.linear.default"] == before - 2
    weight = model.weights["model.layers.0.mlp.gate_proj.weight.gate_up"]
    assert isinstance(weight, Derived)
    assert torch.equal(weight.read(), torch.cat([gate.read(), up.read()]))
    assert model.weights.nbytes() == held


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bloom"])
def test_model_without_two_such_products_is_left_alone(name: str) -> None:
    assert left_alone(MergeGateUp(), traced(name)) == set()


class Gated(nn.Module):
    """One of the forms below, with products to write it with."""

    def __init__(self, form: Callable[[Tensor, Any], Tensor], bias: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.form = form
        self.gate, self.up = (nn.Linear(8, 6, bias=has) for has in bias)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.form(x * 2, self),)


FORMS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "silu": lambda x, m: functional.silu(m.gate(x)) * m.up(x),
    "gate-last": lambda x, m: m.up(x) * functional.silu(m.gate(x)),
    "gelu-tanh": lambda x, m: functional.gelu(m.gate(x), approximate="tanh") * m.up(x),
    "relu": lambda x, m: functional.relu(m.gate(x)) * m.up(x),
    "linear-gate": lambda x, m: torch.sigmoid(m.gate(x)) * m.up(x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["without-bias", "with-bias"])
def test_form_is_one_product(form: str, bias: bool) -> None:
    model = small(Gated(FORMS[form], (bias, bias)), INPUTS, AXES)
    assert check_pass(MergeGateUp(), model, arrays(INPUTS)).count == 1
    (product,) = user_nodes(model.graph.nodes, torch.ops.aten.linear.default)
    assert product.meta["val"].shape[2] == 12


OTHERS: dict[str, tuple[set[str], Callable[[Tensor, Any], Tensor]]] = {
    "another-value": ({VALUES}, lambda x, m: functional.silu(m.gate(x)) * m.up(x + 1)),
    "one-weight": ({TIED}, lambda x, m: functional.silu(m.gate(x)) * functional.linear(x, m.gate.weight)),
    "weight-elsewhere": ({TIED}, lambda x, m: functional.silu(m.gate(x)) * m.up(x) + m.up.weight.sum()),
    "gate-read-twice": ({APART}, lambda x, m: (lambda gate: functional.silu(gate) * m.up(x) + gate)(m.gate(x))),
    "activation-read-twice": (set(), lambda x, m: (lambda gate: gate * m.up(x) + gate)(functional.silu(m.gate(x)))),
    "no-activation": (set(), lambda x, m: m.gate(x) * m.up(x)),
    "value-itself": (set(), lambda x, m: functional.silu(m.gate(x)) * x[..., :6]),
}


@pytest.mark.parametrize("form", OTHERS)
def test_what_cannot_be_one_product_is_left_and_the_reason_given(form: str) -> None:
    reasons, function = OTHERS[form]
    assert left_alone(MergeGateUp(), small(Gated(function), INPUTS, AXES)) == reasons


def test_one_bias_alone_is_left_and_the_reason_given() -> None:
    assert left_alone(MergeGateUp(), small(Gated(FORMS["silu"], (True, False)), INPUTS, AXES)) == {BIASES}


def test_tied_weight_is_left_and_the_reason_given() -> None:
    model = small(Gated(FORMS["silu"]), INPUTS, AXES)
    model.weights = replace(model.weights, entries=model.weights.entries | {"up.weight": model.weights["gate.weight"]})
    assert left_alone(MergeGateUp(), model) == {TIED}
