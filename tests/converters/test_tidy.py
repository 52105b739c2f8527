from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calque.artifact import Limits, TensorSpec
from calque.converters import tidy as tidy_file
from calque.converters.tidy import functionalize, tidy
from calque.traced import TracedModel
from calque.weights import WeightTable
from tests.tiny_models import traced

aten = torch.ops.aten
# torch's own functionalization copies a deprecated class.
X = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])


class Written(nn.Module):
    """A model whose forward is one function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def written(function: Callable[[Tensor], Tensor]) -> TracedModel:
    with torch.no_grad():
        program = torch.export.export(Written(function).eval(), (X.clone(),), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=False)
    spec = TensorSpec("x", "float32", ("rows", 3))
    return TracedModel(program, WeightTable({}), (), (spec,), (TensorSpec("y", "float32", ("rows", 3)),), Limits(), settled=True)


def operators(model: TracedModel) -> Counter[Any]:
    return Counter(node.target for node in model.graph.nodes if node.op == "call_function")


def run(model: TracedModel, x: Tensor) -> Tensor:
    (out,) = torch.fx.Interpreter(model.module).run(x.clone())
    assert isinstance(out, Tensor)
    return out


def in_place_arithmetic(x: Tensor) -> Tensor:
    y = x * 2
    y.div_(3)
    return y - 1


def chained_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.div_(3).add_(1)
    return y - 1


def value_read_before_and_after(x: Tensor) -> Tensor:
    y = x + 1
    before = y * 10
    y.mul_(2)
    return before + y


def write_through_a_view(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 1].mul_(5)
    return y


def write_seen_by_an_earlier_view(x: Tensor) -> Tensor:
    y = x + 1
    row = y.transpose(0, 1)
    y.mul_(5)
    return row.sum() + y


def filled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 2]
    return y.masked_fill_(x < 0, 7.0)


IN_PLACE = [in_place_arithmetic, chained_in_place, value_read_before_and_after, write_through_a_view, write_seen_by_an_earlier_view, filled]


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda function: function.__name__)
def test_operators_in_place_become_functional_and_compute_the_same(function: Callable[[Tensor], Tensor]) -> None:
    model = written(function)
    tidy(model)
    assert not [target for target in operators(model) if target._schema.is_mutable]
    for x in (X, X[:1] - 3, torch.cat([X, X * 2])):
        torch.testing.assert_close(run(model, x), function(x.clone()))


def test_graph_is_not_traced_again_where_an_operator_in_place_is_nobodys_view(monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(in_place_arithmetic)
    monkeypatch.setattr(model.program, "run_decompositions", lambda *_: pytest.fail("traced again"), raising=False)
    assert functionalize(model) == 1


def noise(x: Tensor) -> Tensor:
    y = x.to(torch.float32).contiguous().clone().detach()
    y = nn.functional.dropout(y[:], 0.5, training=False)
    return y.expand(-1, -1) + 1


def casts(x: Tensor) -> Tensor:
    half = x.to(torch.float16)
    return half.type_as(x) + x.to(torch.device("cpu"), torch.float64).to(torch.float32)


def masks(x: Tensor) -> Tensor:
    return ((x > 0) & (x < 4) | (x == -6)).to(torch.float32)


def integers(x: Tensor) -> Tensor:
    return (x.to(torch.int64) & 3 | 8).to(torch.float32)


def test_what_says_nothing_is_removed() -> None:
    model = written(noise)
    assert tidy(model) >= 6
    assert operators(model) == {aten.add.Tensor: 1}
    torch.testing.assert_close(run(model, X), noise(X))


def test_cast_has_one_spelling() -> None:
    model = written(casts)
    tidy(model)
    assert operators(model).keys() == {aten._to_copy.default, aten.add.Tensor}
    torch.testing.assert_close(run(model, X), casts(X))


def test_and_and_or_have_one_spelling_on_masks_alone() -> None:
    model = written(masks)
    tidy(model)
    assert {aten.logical_and.default, aten.logical_or.default} <= operators(model).keys()
    torch.testing.assert_close(run(model, X), masks(X))
    whole = written(integers)
    tidy(whole)
    assert not {aten.logical_and.default, aten.logical_or.default} & operators(whole).keys()
    torch.testing.assert_close(run(whole, X), integers(X))


@pytest.mark.parametrize("cut", [(slice(None), slice(1, None)), (slice(None), slice(0, 2)), (slice(None), slice(0, None, 2))], ids=str)
def test_slice_that_cuts_is_kept(cut: tuple[slice, slice]) -> None:
    model = written(lambda x: x[cut] * 1.5)
    tidy(model)
    assert aten.slice.Tensor in operators(model)
    torch.testing.assert_close(run(model, X), X[cut] * 1.5)


def test_expand_that_repeats_is_kept() -> None:
    model = written(lambda x: x.sum(1, keepdim=True).expand(-1, 3) * x)
    tidy(model)
    assert aten.expand.default in operators(model)
    torch.testing.assert_close(run(model, X), X.sum(1, keepdim=True) * X)


def test_bfloat16_arithmetic_is_done_in_float32_to_the_same_bits() -> None:
    def rounded(x: Tensor) -> Tensor:
        narrow = x.bfloat16()
        return ((narrow * (x / 3).bfloat16() + narrow) / 7.0).float()

    model = written(rounded)
    assert tidy(model) > 0
    for node in model.graph.nodes:
        if node.target in tidy_file.ARITHMETIC:
            assert node.meta["val"].dtype == torch.float32
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(model, x), rounded(x))


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_oss"])
def test_tidy_trace_has_nothing_left_to_tidy(name: str) -> None:
    model = traced(name)
    code = str(model.graph)
    assert tidy(model) == 0
    assert str(model.graph) == code
    left = operators(model).keys()
    assert not left & (tidy_file.ASSERTIONS | tidy_file.COPIES)
    assert not any(target._schema.is_mutable for target in left if isinstance(target, torch._ops.OpOverload))
