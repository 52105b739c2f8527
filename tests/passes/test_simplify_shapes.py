from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calque.passes.simplify_shapes import SimplifyShapes
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import prompt, traced

INPUTS = {"x": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))}
AXES = {"x": {0: "batch", 1: "sequence"}}
COMPUTED = "its shape is computed"


def test_products_of_a_model_take_their_values_as_they_are() -> None:
    model = traced("gpt2")
    done = check_pass(SimplifyShapes(), model, prompt(model))
    left = histogram(model)
    # Four products a layer, heads split thrice and joined once a layer, and three shapes that change nothing.
    assert (done.count, done.skipped) == (2 * 8 + 3, ())
    assert left["aten.addmm.default"] == left["aten.reshape.default"] == 0
    assert (left["calque.split_heads.default"], left["calque.join_heads.default"]) == (6, 2)


def test_heads_of_a_model_need_no_lengths() -> None:
    model = traced("llama")
    assert check_pass(SimplifyShapes(), model, prompt(model)).count == 8
    assert histogram(model)["aten.reshape.default"] == 0


class Shaped(nn.Module):
    """One of the forms below with the parameters that it takes."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(3)
        self.weight, self.square = (nn.Parameter(torch.randn(8, size, generator=generator)) for size in (12, 8))
        self.bias, self.table = nn.Parameter(torch.randn(12, generator=generator)), nn.Parameter(torch.randn(1, 12, generator=generator))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.form(x * 2, self),)


def product(x: Tensor, m: Any, bias: Any = None) -> Tensor:
    return torch.addmm(m.bias if bias is None else bias, x.view(-1, 8), m.weight)


FORMS: dict[str, Callable[..., Tensor]] = {
    "product": lambda x, m: product(x, m).view(*x.shape[:2], 12),
    "split": lambda x, m: x.view(*x.shape[:2], 2, 4) + 1,
    "split-by-rest": lambda x, m: x.view(*x.shape[:2], -1, 4) + 1,
    "same": lambda x, m: x.view(*x.shape[:2], 8) + 1,
    "same-by-rest": lambda x, m: x.reshape(-1, x.shape[1], 8) + 1,
}


@pytest.mark.parametrize("form", FORMS)
def test_form_is_simplified(form: str) -> None:
    model = small(Shaped(FORMS[form]), INPUTS, AXES)
    assert check_pass(SimplifyShapes(), model, arrays(INPUTS)).count == 1
    assert histogram(model)["aten.reshape.default"] == histogram(model)["aten.addmm.default"] == 0


def test_split_and_joined_again_keeps_both() -> None:
    model = small(Shaped(lambda x, m: (x.view(*x.shape[:2], 2, 4) + 1).reshape(*x.shape[:2], 8)), INPUTS, AXES)
    assert check_pass(SimplifyShapes(), model, arrays(INPUTS)).count == 2


OTHERS: dict[str, tuple[set[str], Callable[..., Tensor]]] = {
    "rows-left-flat": (set(), lambda x, m: product(x, m)),
    "other-axes": ({COMPUTED}, lambda x, m: product(x, m).view(x.shape[1], x.shape[0], 12)),
    "columns-apart": ({COMPUTED}, lambda x, m: product(x, m).view(*x.shape[:2], 3, 4)),
    "scaled": ({COMPUTED}, lambda x, m: torch.addmm(m.bias, x.view(-1, 8), m.weight, alpha=2).view(*x.shape[:2], 12)),
    "row-of-biases": ({COMPUTED}, lambda x, m: product(x, m, m.table).view(*x.shape[:2], 12)),
    "merged-axes": ({COMPUTED}, lambda x, m: x.view(x.shape[0], x.shape[1] * 2, 4)),
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_shape_is_left_and_the_reason_given(form: str) -> None:
    reasons, function = OTHERS[form]
    assert left_alone(SimplifyShapes(), small(Shaped(function), INPUTS, AXES)) == reasons
