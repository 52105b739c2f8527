from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from calque import passes
from calque.passes.fuse_residual_norm import FuseResidualNorm
from calque.passes.fuse_rms_norm import FuseRmsNorm
from calque.traced import TracedModel, user_nodes
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import Tiny, prompt, traced, traced_as

RMS, LAYER = "calque.add_rms_norm.default", "calque.add_layer_norm.default"
SIZE = 8


@pytest.mark.parametrize(
    ("name", "joined", "norm", "alone"),
    [
        ("llama", 4, RMS, 1), ("qwen3", 4, RMS, 5), ("gemma2", 4, RMS, 5), ("gemma3_text", 6, RMS, 13), ("phi3", 4, RMS, 1),
        ("gpt_oss", 4, RMS, 1), ("mixtral", 4, RMS, 1), ("gpt2", 5, LAYER, 0), ("gpt_neox", 2, LAYER, 3), ("bloom", 4, LAYER, 2),
    ],
)  # fmt: skip
def test_norms_of_residual_sums_are_joined_with_them(name: str, joined: int, norm: str, alone: int) -> None:
    model = traced(name)
    passes.run_one(FuseRmsNorm(), model)
    sums = histogram(model)["aten.add.Tensor"]
    done = check_pass(FuseResidualNorm(), model, prompt(model))
    assert (done.count, done.skipped) == (joined, ())
    left = histogram(model)
    assert left[norm] == joined
    assert left["calque.rms_norm.default"] + left["aten.layer_norm.default"] == alone
    assert left["aten.add.Tensor"] == sums - joined


def test_weight_with_one_added_is_made_before_the_sum() -> None:
    model = traced_as(Tiny("nemotron", extra={"pad_token_id": 0}))
    done = check_pass(FuseResidualNorm(), model, prompt(model))
    assert (done.count, done.skipped) == (4, ())


class Stream(nn.Module):
    """``form`` of a sum and its norm."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(7)
        self.weight, self.bias = (nn.Parameter(torch.randn(SIZE, generator=generator)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.form(x.tanh(), y.sin(), self.weight, self.bias)


def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {name: torch.randn(2, 3, SIZE, generator=generator) for name in ("x", "y")}


def graph(form: Callable[..., Tensor]) -> TracedModel:
    return small(Stream(form), given(), {})


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.calque.rms_norm(x, weight, 1e-5)
    return made


def read_before_its_norm(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = x + y
    gate = total.sigmoid()
    return rms(total, w) * gate + total


def normed_twice(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = x + y
    return rms(total, w) - rms(total, b)


def added_to_something_else(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return y + rms(x + y, w) * 2 + x


FORMS: dict[str, Callable[..., Tensor]] = {
    "rms": lambda x, y, w, b: rms(x + y, w),
    "layer": lambda x, y, w, b: layer_norm(x + y, [SIZE], w, b, 1e-3),
    "layer-without-bias": lambda x, y, w, b: layer_norm(x + y, [SIZE], w),
    "read-before": read_before_its_norm,
    "another-residual": added_to_something_else,
    "weight-and-one": lambda x, y, w, b: layer_norm(x + y, [SIZE], w + 1, b),
    "normed-twice": normed_twice,
    "sum-of-itself": lambda x, y, w, b: rms(x + x, w),
}


@pytest.mark.parametrize("name", FORMS)
def test_written_form_is_one_operator_that_gives_norm_and_sum(name: str) -> None:
    model = graph(FORMS[name])
    done = check_pass(FuseResidualNorm(), model, arrays(given()))
    assert (done.count, done.skipped) == (1, ())


def test_norm_and_sum_are_two_results_of_one_operator() -> None:
    model = graph(read_before_its_norm)
    passes.run_one(FuseResidualNorm(), model)
    (fused,) = user_nodes(model.graph.nodes, torch.ops.calque.add_rms_norm.default)
    normed, total = sorted(fused.users, key=lambda node: str(node.args[1]))
    assert len(normed.users) == 1
    assert {str(reader.target) for reader in total.users} == {"aten.sigmoid.default", "aten.add.Tensor"}


def test_epsilon_of_a_layer_norm_is_kept_and_its_default_filled_in() -> None:
    for name, epsilon in (("layer", 1e-3), ("layer-without-bias", 1e-5)):
        model = graph(FORMS[name])
        passes.run_one(FuseResidualNorm(), model)
        (fused,) = user_nodes(model.graph.nodes, torch.ops.calque.add_layer_norm.default)
        assert fused.args[4] == epsilon
        assert (fused.args[3] is None) == (name == "layer-without-bias")


NEARLY: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "broadcast": (lambda x, y, w, b: rms(x + y[:, :1], w), set()),
    "number": (lambda x, y, w, b: rms(x + 1.0, w), set()),
    "bias": (lambda x, y, w, b: rms(x + b, w), set()),
    "scaled": (lambda x, y, w, b: rms(torch.add(x, y, alpha=2), w), set()),
    "difference": (lambda x, y, w, b: rms(x - y, w), set()),
    "no-weight": (lambda x, y, w, b: rms(x + y, None), set()),
    "layer-without-weight": (lambda x, y, w, b: layer_norm(x + y, [SIZE]), set()),
    "layer-over-two-axes": (lambda x, y, w, b: layer_norm(x + y, [3, SIZE], w.expand(3, SIZE), b.expand(3, SIZE)), set()),
    "four-axes": (lambda x, y, w, b: rms(x[:, None] + y[:, None], w), set()),
    "computed-weight": (lambda x, y, w, b: rms(x + y, x.sum((0, 1)) * w), {"its weight is computed from more than parameters"}),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_no_residual_or_no_such_norm_is_left_alone(name: str) -> None:
    form, reasons = NEARLY[name]
    assert left_alone(FuseResidualNorm(), graph(form)) == reasons
