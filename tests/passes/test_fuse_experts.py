from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calque import passes
from calque.passes import Rewrites
from calque.passes.fuse_experts import FuseExperts
from calque.passes.quantize_weights import QuantizeWeights
from calque.traced import TracedModel
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, small
from tests.tiny_models import prompt, traced

INPUTS = {"x": torch.randn(5, 32, generator=torch.Generator().manual_seed(2))}
AXES = {"x": {0: "batch"}}
FUSED, DEQUANTIZED = "calque.packed_experts.default", "calque.dequantize_weight.default"
Gate = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8, "group": 0}], ids=str)
def test_mixture_becomes_one_operator_with_the_same_numbers(name: str, options: dict[str, Any]) -> None:
    model = traced(name)
    passes.run_one(QuantizeWeights(**options), model)
    done = check_pass(FuseExperts(), model, prompt(model))
    layers = 1 if name == "qwen3_moe" else 2
    assert done == Rewrites(layers)
    assert histogram(model)[FUSED] == layers
    assert not any(".experts." in name and name.endswith((".q", ".scale")) for name in model.weights.entries)


class Mixture(nn.Module):
    """Four experts of which a token takes two, behind a gate."""

    def __init__(self, gate: Gate, hidden: int = 32, inner: int = 48, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate, self.bias = gate, nn.Parameter(torch.randn(4, hidden)) if bias else None
        self.router = nn.Linear(hidden, 4, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(4, *sizes) / 6) for sizes in ((2 * inner, hidden), (hidden, inner)))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = x * 2
        weights, index = self.router(x).softmax(-1).topk(2)
        routing = ((index.unsqueeze(-1) == torch.arange(4)).float() * weights.unsqueeze(-1)).sum(1)
        out = torch.matmul(self.gate(torch.matmul(x.unsqueeze(0), self.up.transpose(1, 2))), self.down.transpose(1, 2))
        if self.bias is not None:
            out = out + self.bias.unsqueeze(1)
        return ((out * routing.transpose(0, 1).unsqueeze(-1)).sum(0),)


def halves(up: Tensor) -> Tensor:
    gate, value = up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


def split(up: Tensor) -> Tensor:
    gate, value = torch.split(up, 48, -1)
    return torch.nn.functional.silu(gate) * value


def thirds(up: Tensor) -> Tensor:
    gate, value, _ = torch.split(up, 32, -1)
    return torch.cat([torch.nn.functional.silu(gate) * value, gate[..., :16]], -1)


def limited(up: Tensor) -> Tensor:
    gate, value = up[..., 0::2].clamp(max=1.5), up[..., 1::2].clamp(-1.5, 1.5)
    return (value + 0.5) * (gate * torch.sigmoid(1.3 * gate))


def unlike(up: Tensor) -> Tensor:
    gate, value = up.chunk(2, -1)
    return torch.nn.functional.gelu(gate) * value


def uneven(up: Tensor) -> Tensor:
    gate, value = up[..., 0::2].clamp(max=1.5), up[..., 1::2].clamp(-1.0, 1.5)
    return torch.nn.functional.silu(gate) * value


def swapped(up: Tensor) -> Tensor:
    value, gate = up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


def mixture(module: Mixture, **options: Any) -> TracedModel:
    model = small(module, INPUTS, AXES)
    assert passes.run_one(QuantizeWeights(**{"group": 16, **options}), model).count == 2
    return model


@pytest.mark.parametrize("gate", [halves, limited, split])
@pytest.mark.parametrize("options", [{}, {"symmetric": False, "group": 32}, {"bits": 8, "group": 0}], ids=str)
def test_gate_is_recognised_with_its_numbers_biases_and_groups(gate: Gate, options: dict[str, Any]) -> None:
    assert check_pass(FuseExperts(), mixture(Mixture(gate, bias=True), **options), arrays(INPUTS)).count == 1


@pytest.mark.parametrize(
    ("module", "options", "why"),
    [
        (Mixture(unlike), {}, "its experts have another gate than g · sigmoid(alpha · g) · (v + beta)"),
        (Mixture(uneven), {}, "its experts have another gate than g · sigmoid(alpha · g) · (v + beta)"),
        (Mixture(thirds), {}, "its experts have another gate than g · sigmoid(alpha · g) · (v + beta)"),
        (Mixture(swapped), {}, "its experts have another gate than g · sigmoid(alpha · g) · (v + beta)"),
        (Mixture(halves), {"overrides": {"down": "int8"}}, "its weights are of 4 and 8 bits"),
        (Mixture(halves, inner=40), {"bits": 8, "group": 0}, "its rows divide into no common group of 16 or more"),
        (Mixture(halves, inner=16), {"symmetric": False}, "its rows divide into no common group of 16 or more"),
    ],
    ids=["gelu", "uneven", "thirds", "swapped", "bits", "rows", "one-group-with-zero-points"],
)
def test_mixture_that_the_kernel_cannot_do_keeps_its_products_with_the_reason(module: Mixture, options: dict[str, Any], why: str) -> None:
    model = mixture(module, **options)
    done = passes.run_one(FuseExperts(), model)
    assert (done.count, [reason for _, reason in done.skipped]) == (0, [why])
    assert histogram(model)[DEQUANTIZED] == 2


def test_eight_bits_are_left_alone_where_nothing_may_be_rounded() -> None:
    done = passes.run_one(FuseExperts(rounded=False), mixture(Mixture(halves), bits=8))
    assert [reason for _, reason in done.skipped] == ["the kernel rounds activations where weights are of 8 bits"]
    assert passes.run_one(FuseExperts(rounded=False), mixture(Mixture(halves))).count == 1


def test_experts_of_floats_are_left_alone() -> None:
    model = traced("mixtral")
    done = passes.run_one(FuseExperts(), model)
    assert (done.count, {reason for _, reason in done.skipped}) == (0, {"its last product does not read integers as they come"})
