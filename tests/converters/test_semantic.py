from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as masks

from calque.converters import semantic
from calque.traced import TracedModel, user_nodes
from tests.tiny_models import TYPES, config_of, eager_model, traced

calque = torch.ops.calque


def arguments(model: TracedModel, target: Any) -> list[tuple[Any, ...]]:
    return [node.args for node in user_nodes(model.graph.nodes, target)]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", {("causal", 0)}),
        ("mistral", {("sliding", 8)}),
        ("gemma2", {("causal", 0), ("sliding", 8)}),
        ("gpt_oss", {("causal", 0), ("sliding", 8)}),
    ],
)
def test_masks_say_the_kind_of_the_function_that_made_them(name: str, kinds: set[tuple[str, int]]) -> None:
    assert {(kind, window) for _, _, kind, window in arguments(traced(name), calque.attention_mask.default)} == kinds


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_every_layer_is_one_attention_over_its_own_cache(name: str) -> None:
    model = traced(name)
    layers = range(model.layers)
    assert [args[2] for args in arguments(model, calque.cache_update.default)] == [
        f"{i}.{kind}" for i in layers for kind in ("key", "value")
    ]
    assert len(arguments(model, calque.attention.default)) == model.layers


def test_scale_softcap_and_sinks_are_the_models() -> None:
    gemma2, gpt_oss = traced("gemma2"), traced("gpt_oss")
    assert {args[4:7] for args in arguments(gemma2, calque.attention.default)} == {(24**-0.5, 3.0, None)}
    assert all(args[6].meta["val"].shape == (4,) for args in arguments(gpt_oss, calque.attention.default))


def test_attention_with_code_of_its_own_stays_aten() -> None:
    model = traced("bloom")
    assert arguments(model, calque.attention.default) == []
    assert len(arguments(model, calque.cache_update.default)) == 4


def test_mask_is_custom_outside_of_any_function_that_makes_masks() -> None:
    assert semantic.mask_kind() == "custom"


def made(function: Any, **overlay: Any) -> str:
    """The kind that the mask interface is told by one of transformers' own functions."""
    told: list[str] = []

    def interface(*_: Any, **__: Any) -> Tensor:
        told.append(semantic.mask_kind())
        return torch.ones(1, 1, 3, 3, dtype=torch.bool)

    masks.AttentionMaskInterface.register("told", interface)
    config = config_of(TYPES["mistral"])
    config._attn_implementation = "told"
    config.attention_chunk_size = 4
    function(config, torch.zeros(1, 3, 64), attention_mask=torch.tensor([[0, 1, 1]]), past_key_values=None, **overlay)
    return told[0]


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (masks.create_causal_mask, "causal"),
        (masks.create_sliding_window_causal_mask, "sliding"),
        (masks.create_chunked_causal_mask, "chunked"),
        (masks.create_bidirectional_mask, "bidirectional"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_kind_is_that_of_the_calling_function(function: Any, kind: str) -> None:
    assert made(function) == kind


def test_mask_that_a_model_lays_a_function_over_is_custom() -> None:
    assert made(masks.create_causal_mask, or_mask_function=lambda batch, head, query, key: key >= 0) == "custom"


def test_window_under_an_overlay_counts_positions_and_the_overlay_is_laid_over_it() -> None:
    semantic.register()
    config = config_of(TYPES["mistral"])
    config._attn_implementation, config.sliding_window = semantic.NAME, 3
    # Two tokens, a gap of four, three tokens: the last of them sees two before it, across the gap or not.
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 1]])

    def full(**overlay: Any) -> Tensor:
        made: Any = masks.create_sliding_window_causal_mask(
            config, torch.zeros(1, 9, 64), attention_mask=mask, past_key_values=None, **overlay
        )
        return torch.where(mask.bool(), made[0, 0], False)[mask[0].bool()][:, mask[0].bool()]

    alone = torch.ones(5, 5, dtype=torch.bool).tril().triu(-2)
    groups = torch.tensor([[0, 0, -1, -1, -1, -1, -1, -1, -1]])
    assert torch.equal(full(), alone)
    assert torch.equal(full(block_sequence_ids=groups), alone | torch.nn.functional.pad(torch.ones(2, 2), (0, 3, 0, 3)).bool())
    assert torch.equal(full(or_mask_function=lambda batch, head, query, key: key == 0), alone | (torch.arange(5) == 0))
    assert torch.equal(full(and_mask_function=lambda batch, head, query, key: key != 0), alone & (torch.arange(5) != 0))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_all_experts_weighted_equal_the_loop_over_those_that_were_hit(name: str) -> None:
    model: Any = eager_model(TYPES[name])
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, 64, generator=generator)
    scores = torch.rand(6, 4, generator=generator)
    weights, index = torch.topk(scores, 2)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = experts(hidden, index, weights)
        got = semantic.all_experts(experts, hidden, index, weights)
    assert (got - expected).abs().max() < 1e-5 * expected.std()


def test_recording_cache_remembers_heads_and_sizes_and_holds_nothing() -> None:
    cache = semantic.RecordingCache()
    key, value = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 6)
    assert cache.update(key, value, 4) == (key, value)
    assert cache.seen == {4: (2, 8, 6)}
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(3, 0) == (3, 0)


def test_traced_cache_adds_to_the_placeholders_of_the_layer() -> None:
    past = [torch.full((1, 2, 5, 8), float(i)) for i in range(4)]
    cache = semantic.TracedCache([1, 3], past)
    key, value = cache.update(torch.zeros(1, 2, 2, 8), torch.ones(1, 2, 2, 8), 3)
    assert torch.equal(key[:, :, :5], past[2])
    assert torch.equal(value[:, :, :5], past[3])
    assert torch.equal(value[:, :, 5:], torch.ones(1, 2, 2, 8))
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(2, 3) == (7, 0)
