from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calque import passes
from calque.passes.fuse_layer_norm import FuseLayerNorm
from calque.passes.fuse_residual_norm import FuseResidualNorm
from calque.traced import user_nodes
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import Tiny, prompt, traced, traced_as

COHERE = Tiny("cohere", head_dim=16)
SIZE = 8
INPUTS = {"x": torch.randn(2, 3, SIZE, generator=torch.Generator().manual_seed(1)) * 3 + 1, "y": torch.ones(2, 3, SIZE) * 0.5}


def test_every_norm_of_a_model_is_one_operator() -> None:
    model = traced_as(COHERE)
    done = check_pass(FuseLayerNorm(), model, prompt(model))
    assert (done.count, done.skipped) == (3, ())
    left = histogram(model)
    assert left["aten.layer_norm.default"] == 3
    assert left["aten.rsqrt.default"] == left["aten.mean.dim"] == left["aten.sub.Tensor"] - 1 == 0


def test_norm_is_then_joined_with_the_sum_before_it() -> None:
    model = traced_as(COHERE)
    done = passes.run_all((FuseLayerNorm(),), model)["fuse_layer_norm"]
    assert (done.count, check_pass(FuseResidualNorm(), model, prompt(model)).count) == (3, 2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_model_without_written_out_layer_norms_is_left_alone(name: str) -> None:
    assert left_alone(FuseLayerNorm(), traced(name)) == set()


class Norm(nn.Module):
    """Parameters to write norms with, and one of the forms below, of a value that is itself computed."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(4)
        self.weight, self.bias = (nn.Parameter(torch.randn(SIZE, generator=generator)) for _ in range(2))
        self.matrix = nn.Parameter(torch.randn(3, SIZE, generator=generator))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (self.form(x * y, y, self.weight, self.bias, self.matrix),)


def spread(x: Tensor, axis: int = -1) -> Tensor:
    return (x - x.mean(axis, keepdim=True)).pow(2).mean(axis, keepdim=True) + 1e-5


def plain(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(spread(x))


# How many of weight and bias each takes.
FORMS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "cohere": (1, lambda x, y, w, b, m: w * plain(x)),
    "weight-after": (1, lambda x, y, w, b, m: plain(x) * w),
    "with-bias": (2, lambda x, y, w, b, m: plain(x) * w + b),
    "bias-before": (2, lambda x, y, w, b, m: b + w * plain(x)),
    "bias-alone": (1, lambda x, y, w, b, m: plain(x) + b),
    "bare": (0, lambda x, y, w, b, m: plain(x)),
    "root": (1, lambda x, y, w, b, m: w * ((x - x.mean(-1, keepdim=True)) / torch.sqrt(spread(x)))),
    "power": (1, lambda x, y, w, b, m: w * ((x - x.mean(-1, keepdim=True)) * torch.pow(spread(x), -0.5))),
    "variance": (
        2, lambda x, y, w, b, m: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w + b
    ),
    "with-a-matrix": (0, lambda x, y, w, b, m: plain(x) * m),
    "with-a-gate": (0, lambda x, y, w, b, m: plain(x) * y),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_form_is_one_operator_with_its_parameters(form: str) -> None:
    taken, function = FORMS[form]
    model = small(Norm(function), INPUTS, {})
    done = check_pass(FuseLayerNorm(), model, arrays(INPUTS))
    assert (done.count, done.skipped) == (1, ())
    (norm,) = user_nodes(model.graph.nodes, torch.ops.aten.layer_norm.default)
    assert sum(part is not None for part in norm.args[2:4]) == taken
    assert histogram(model)["aten.mean.dim"] == histogram(model)["aten.rsqrt.default"] == 0


OTHERS: dict[str, tuple[set[str], Callable[..., Tensor]]] = {
    "deviation-read-again": (
        {"it divides something else than what was centred"}, lambda x, y, w, b, m: (lambda s: (x - x.mean(-1, keepdim=True)) * s + s)(
            torch.rsqrt(spread(x)))
    ),
    "not-centred": ({"it divides something else than what was centred"}, lambda x, y, w, b, m: x * torch.rsqrt(spread(x))),
    "of-another": (
        {"it divides something else than what was centred"}, lambda x, y, w, b, m: (y - y.mean(-1, keepdim=True)) * torch.rsqrt(spread(x))
    ),
    "another-axis": (set(), lambda x, y, w, b, m: (x - x.mean(1, keepdim=True)) * torch.rsqrt(spread(x, 1))),
    "root-mean-square": (set(), lambda x, y, w, b, m: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "unbiased": (
        set(), lambda x, y, w, b, m: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=True) + 1e-5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_layer_norm_is_left(form: str) -> None:
    reasons, function = OTHERS[form]
    assert left_alone(FuseLayerNorm(), small(Norm(function), INPUTS, {})) == reasons
