from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calque import passes
from calque.passes.quantize_weights import QuantizeWeights
from calque.products import Reading
from calque.quantization import Scheme, dequantize, quantize
from calque.traced import user_nodes
from calque.weights import Derived
from tests.passes.check_pass import histogram
from tests.passes.small_graphs import arrays, small
from tests.quantized_models import Quantized
from tests.tiny_models import answers, traced

INPUTS = {"x": torch.randn(3, 32, generator=torch.Generator().manual_seed(2))}
AXES = {"x": {0: "batch"}}


class Product(nn.Module):
    """One of the ways in which models write a product, with weights to write it with."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.form, self.weight = form, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.form(x * 2, self.weight),)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "falcon": (lambda x, w: x @ w.T, (48, 32)),
    "transposed": (lambda x, w: torch.matmul(x, w.transpose(-1, -2)), (48, 32)),
    "permuted": (lambda x, w: torch.mm(x, w.permute(1, 0)), (48, 32)),
    "inputs-first": (lambda x, w: torch.mm(x, w), (32, 48)),
    "experts": (lambda x, w: torch.matmul(x.unsqueeze(0), w.transpose(1, 2)).sum(0), (4, 48, 32)),
    "experts-inputs-first": (lambda x, w: torch.matmul(x.unsqueeze(0), w).sum(0), (4, 32, 48)),
    "experts-batched": (lambda x, w: torch.bmm(x.unsqueeze(0).expand(4, -1, -1), w).sum(0), (4, 32, 48)),
    "experts-in-one-matrix": (lambda x, w: torch.matmul(x.unsqueeze(0), w.view(-1, 48, 32).transpose(1, 2)).sum(0), (192, 32)),
    "experts-in-one-matrix-inputs-first": (lambda x, w: torch.matmul(x.unsqueeze(0), w.view(-1, 32, 48)).sum(0), (128, 48)),
    "some-experts": (lambda x, w: torch.matmul(x.unsqueeze(0), w[:2].transpose(1, 2)).sum(0), (4, 48, 32)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_product_computes_what_its_integers_stand_for_in_each_way_of_writing_it(form: str, symmetric: bool) -> None:
    module = Product(FORMS[form][0], *FORMS[form][1])
    model = small(module, INPUTS, AXES)
    assert passes.run_one(QuantizeWeights(group=16, symmetric=symmetric, head="int4"), model).count == 1
    with torch.no_grad():
        assert not torch.equal(module.weight, model.replaced["weight"].read())
        module.weight.copy_(model.replaced["weight"].read())
        expected = module(INPUTS["x"])[0].numpy()
    (found,) = answers(model, arrays(INPUTS)).values()
    assert abs(found - expected).max() <= 1e-5 * expected.std()
    assert histogram(model)["calque.dequantize_weight.default"] == 1
    assert not [name for name in model.parameters() if name == "weight"]


@pytest.mark.parametrize("form", ["falcon", "transposed", "permuted"])
def test_turned_weight_is_read_by_a_linear_layer(form: str) -> None:
    model = small(Product(FORMS[form][0], *FORMS[form][1]), INPUTS, AXES)
    assert histogram(model)["aten.linear.default"] == 1
    assert not histogram(model).keys() & {"aten.mm.default", "aten.matmul.default", "aten.transpose.int", "aten.permute.default"}


def test_groups_lie_along_the_inputs_of_each_expert_whatever_comes_first() -> None:
    weight = torch.randn(3, 32, 8, generator=torch.Generator().manual_seed(5))
    stored = Derived((), "given", lambda: weight, "float32", (3, 32, 8))
    rows = Reading("inputs first", 3).rows(stored)
    assert torch.equal(rows.read(), weight.transpose(1, 2).reshape(24, 32))
    made = quantize(rows.read(), Scheme(8, 16))
    back = Reading("inputs first", 3).restored(
        Derived((), "given", lambda: dequantize(made.q, made.scale, None, 16), "float32", (24, 32)), (3, 32, 8)
    )
    assert (back.read() - weight).abs().max() < 0.02


def test_weight_read_otherwise_is_left_alone_with_the_reason() -> None:
    model = small(Product(lambda x, w: (x.unsqueeze(1) * w).sum(-1), 48, 32), INPUTS, AXES)
    done = passes.run_one(QuantizeWeights(), model)
    assert (done.count, done.skipped) == (0, (("weight", "read by aten.mul.Tensor, which is no linear layer and no embedding"),))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_integers_and_the_router_is_not(name: str) -> None:
    model = traced(name)
    done = passes.run_one(QuantizeWeights(), model)
    held = {name for name in model.replaced if ".experts." in name}
    assert len(held) == 4
    assert {user.args[3] for user in user_nodes(model.graph.nodes, torch.ops.calque.dequantize_weight.default)} == {4, 8}
    router = [(name, why) for name, why in done.skipped if "gate.weight" in name or "router.weight" in name]
    assert len(router) == 2
    assert {why for _, why in router} == {"kept as it is"}


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int4", {"group": 16}),
        ("int4", {"group": 64}),
        ("int4", {"group": 128, "symmetric": False}),
        ("int4", {"group": 256, "embedding": "int4", "head": "int4", "symmetric": False}),
        ("int4", {"group": 0}),
        ("int8", {"symmetric": False}),
        ("int8", {"group": 32}),
        ("int8", {"group": 64, "symmetric": False, "head": "int4"}),
        ("int4", {"overrides": {"*.down_proj.weight": "int8", "*.0.*": "keep"}}),
    ],
    ids=str,
)
def test_artifact_is_faithful_in_every_scheme(precision: str, options: dict[str, Any]) -> None:
    made = Quantized("llama", precision, **options)
    assert made.done["quantize_weights"].count
    assert made.faults() == []


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gpt_neox"])
def test_artifact_is_faithful_where_products_are_written_otherwise(name: str) -> None:
    assert Quantized(name).faults() == []
