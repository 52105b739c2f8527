"""Integers lie in panels where a product or a lookup reads them, and come out of them as they went in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calque import passes
from calque.panel_ops import lay_in_panels, lay_scales, out_of_panels, out_of_scales
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.pack_panels import PackPanels
from calque.passes.quantize_weights import QuantizeWeights
from calque.quantization import round_blocks
from calque.traced import TracedModel, user_nodes
from tests.tiny_models import answers, prompt, traced

calque = torch.ops.calque


def packed(name: str, quantize: QuantizeWeights) -> tuple[TracedModel, TracedModel, passes.Rewrites]:
    """The model with its integers apart and in panels, and what the pass did."""
    model = traced(name)
    passes.run([quantize, CacheDynamic()], model)
    apart = model.copy()
    return apart, model, passes.run_one(PackPanels(), model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "quantize",
    [QuantizeWeights(group=16), QuantizeWeights(group=32, symmetric=False), QuantizeWeights(8, 0), QuantizeWeights(8, 16, False)],
    ids=str,
)
def test_panels_change_no_value(name: str, quantize: QuantizeWeights) -> None:
    apart, together, done = packed(name, quantize)
    assert done.count >= 11
    assert not done.skipped
    assert not user_nodes(together.graph.nodes, calque.dequantize_weight.default)
    inputs = prompt(apart)
    want, got = (np.asarray(answers(model, inputs)["logits"], np.float32) for model in (apart, together))
    assert np.abs(want - got).max() < 1e-5 * want.std()


def test_a_second_time_changes_nothing_and_a_tied_table_is_laid_once() -> None:
    _, model, _ = packed("gemma2", QuantizeWeights(group=16))
    nodes = len(model.graph.nodes)
    assert passes.run_one(PackPanels(), model).count == 0
    assert len(model.graph.nodes) == nodes
    [lookup] = user_nodes(model.graph.nodes, calque.panel_lookup.default)
    assert lookup.args[1] in {product.args[1] for product in user_nodes(model.graph.nodes, calque.panel_linear.default)}


def test_experts_are_left_with_the_reason() -> None:
    _, model, done = packed("mixtral", QuantizeWeights(8, 0))
    assert done.count
    assert {why.partition(" reads it")[0] for _, why in done.skipped} <= {"aten.reshape.default", "aten.view.default"}
    assert user_nodes(model.graph.nodes, calque.dequantize_weight.default)


def test_integers_of_4_bits_take_half_a_byte_wherever_they_are_read() -> None:
    apart, model, done = packed("mixtral", QuantizeWeights(4, 32))
    assert done.skipped
    stored = [name for name, node in model.parameters().items() if node.meta["val"].dtype == torch.int8]
    assert not [name for name in stored if "experts" in name]
    assert not passes.run_one(PackPanels(), model).count
    inputs = prompt(apart)
    want, got = (np.asarray(answers(each, inputs)["logits"], np.float32) for each in (apart, model))
    assert np.abs(want - got).max() < 1e-5 * want.std()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", [8, 11, 1])
def test_integers_come_out_as_they_went_in(bits: int, outputs: int) -> None:
    bound = 1 << (bits - 1)
    q = torch.randint(-bound, bound, (outputs, 48), generator=torch.Generator().manual_seed(outputs), dtype=torch.int8)
    scale = torch.rand(outputs, 3) + 0.1
    laid = lay_in_panels(q, bits)
    assert laid.numel() == -(-outputs // 8) * 8 * 48 * bits // 8
    assert torch.equal(out_of_panels(laid)[:outputs], q)
    assert torch.equal(out_of_scales(lay_scales(scale))[:outputs], scale)
    assert not out_of_scales(lay_scales(scale))[outputs:].any()


def test_a_switch_says_whether_values_are_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-128, 128, (11, 32), generator=generator, dtype=torch.int8)
    scale, x = torch.rand(11, 1, generator=generator), torch.randn(2, 3, 32, generator=generator)
    laid = lay_in_panels(q, 8), lay_scales(scale), None, None
    weight = q * scale
    for switch, given in ((None, x), (torch.tensor([0], dtype=torch.int8), x), (torch.tensor([1], dtype=torch.int8), round_blocks(x, 16))):
        torch.testing.assert_close(calque.panel_linear(x, *laid, switch, 8, 16, 11), given @ weight.T)
    torch.testing.assert_close(calque.panel_lookup(torch.tensor([[10, 0]]), *laid[:3]), weight[[10, 0]][None])
