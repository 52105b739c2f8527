"""Complex arithmetic written in real numbers computes the same, and is left alone where it cannot be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calque.artifact import Limits, TensorSpec
from calque.converters.complex_numbers import write_in_real_numbers
from calque.traced import TracedModel
from calque.weights import WeightTable


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def turned(x: Tensor) -> Tensor:
    angle = x[..., :2].contiguous()
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs(x) * turn).flatten(1)


def scaled(x: Tensor) -> Tensor:
    return torch.view_as_real(pairs(x) * x[:, :1] * 0.5).flatten(1)


def stretched(x: Tensor) -> Tensor:
    turn = torch.polar(x[:, :2].contiguous(), x[:, 2:].contiguous()).unsqueeze(-1)[:, :1]
    return torch.view_as_real(turn * pairs(x).unsqueeze(1)).flatten(1)


def parts(x: Tensor) -> Tensor:
    made = torch.complex(x[:, :2].contiguous(), x[:, 2:].contiguous())
    product = made * made
    return torch.cat([product.real, product.imag], 1)


def unknown(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.exp(pairs(x))).flatten(1)


def written(function: Callable[[Tensor], Tensor]) -> TracedModel:
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("rows")},)
        program = torch.export.export(Written(function).eval(), (torch.ones(3, 4),), dynamic_shapes=shapes, strict=False)
    spec = TensorSpec("x", "float32", ("rows", 4))
    return TracedModel(program, WeightTable({}), (), (spec,), (TensorSpec("y", "float32", ("rows", 4)),), Limits(), settled=True)


def complex_nodes(model: TracedModel) -> list[str]:
    values = {node.name: node.meta.get("val") for node in model.graph.nodes}
    return [name for name, value in values.items() if isinstance(value, Tensor) and value.is_complex()]


@pytest.mark.parametrize("function", [turned, scaled, stretched, parts])
def test_no_complex_value_is_left_and_the_result_is_the_same(function: Callable[[Tensor], Tensor]) -> None:
    model = written(function)
    assert write_in_real_numbers(model) > 0
    assert complex_nodes(model) == []
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    (out,) = torch.fx.Interpreter(model.module).run(x.clone())
    torch.testing.assert_close(out, function(x), rtol=1e-6, atol=1e-6)


def test_graph_without_complex_values_is_left_alone() -> None:
    assert write_in_real_numbers(written(lambda x: x * 2)) == 0


def test_graph_with_an_unknown_complex_operator_is_left_as_it_was() -> None:
    model = written(unknown)
    before = [node.name for node in model.graph.nodes]
    assert write_in_real_numbers(model) == 0
    assert [node.name for node in model.graph.nodes] == before
