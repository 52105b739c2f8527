from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calque import ops, passes
from calque.passes import Pass
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.fuse_grouped_attention import FuseGroupedAttention
from calque.passes.fuse_rms_norm import FuseRmsNorm
from calque.passes.fuse_rotary import FuseRotary
from calque.passes.merge_qkv import MergeQkv
from calque.traced import TracedModel, user_nodes
from calque.weights import Derived
from tests.passes.check_pass import check_pass
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import TYPES, Tiny, prompt, traced, traced_as

grouped = torch.ops.calque.grouped_attention.default
APART, VALUES = (
    "its queries, keys and values are not three products as they come out",
    "its queries, keys and values are products of different values",
)
BIASES, TIED = "some of its products have a bias, and some have none", "its weights are tied, or read by other operators too"
LLAMA16, QWEN16, QWEN3_16 = (Tiny(name, head_dim=16) for name in ("llama", "qwen2", "qwen3"))


def ready(model: TracedModel, padding: Any) -> TracedModel:
    plan: list[Pass] = [FuseRmsNorm(), FuseRotary(), CacheDynamic(), FuseGroupedAttention(padding)]
    passes.run(plan, model)
    return model


@pytest.mark.parametrize("padding", ["any", "right"])
def test_one_product_that_a_model_splits_is_not_cut_apart(padding: str) -> None:
    model = ready(traced("gpt2"), padding)
    assert check_pass(MergeQkv(), model, prompt(model)).count == 2
    assert user_nodes(model.graph.nodes, torch.ops.aten.split.Tensor) == []
    assert [node.args[1:3] for node in user_nodes(model.graph.nodes, grouped)] == [(None, None)] * 2


def test_one_product_that_a_model_slices_is_not_cut_apart() -> None:
    model = ready(traced("phi3"), "right")
    assert check_pass(MergeQkv(), model, prompt(model)).count == 2
    attentions = user_nodes(model.graph.nodes, grouped)
    assert {node.args[0].target for node in attentions} == {torch.ops.aten.linear.default}  # type: ignore[union-attr]
    assert "model.layers.0.self_attn.qkv_proj.weight" in model.weights


@pytest.mark.parametrize(("tiny", "parts"), [(LLAMA16, ["weight"]), (QWEN16, ["weight", "bias"])], ids=["llama", "qwen2"])
def test_three_products_of_one_value_are_one_with_their_weights_stacked(tiny: Tiny, parts: list[str]) -> None:
    model = ready(traced_as(tiny), "right")
    names = [[f"model.layers.0.self_attn.{kind}_proj.{part}" for kind in "qkv"] for part in parts]
    sources = [tuple(model.weights[name] for name in group) for group in names]
    before = model.weights.nbytes()
    done = check_pass(MergeQkv(), model, prompt(model))
    assert (done.count, done.skipped) == (2, ())
    for group, given in zip(names, sources, strict=True):
        weight = model.weights[f"{group[0]}.qkv"]
        assert isinstance(weight, Derived)
        assert (weight.sources, weight.shape[0]) == (given, 128)
        assert torch.equal(weight.read(), torch.cat([source.read() for source in given]))
        assert not model.weights.entries.keys() & set(group)
    assert model.weights.nbytes() == before


@pytest.mark.parametrize(
    ("tiny", "padding", "steps"),
    [
        (TYPES["llama"], "right", ["flat_rotary"]), (LLAMA16, "any", ["flat_rotary"]), (QWEN3_16, "right", ["flat_rms_norm"]),
        (QWEN3_16, "any", ["flat_rms_norm", "flat_rotary"]), (TYPES["phi3"], "any", ["flat_rotary"]),
    ],
    ids=["turned-before", "turned-before-for-padding", "normed-before", "normed-and-turned", "turned-slices"],
)  # fmt: skip
def test_queries_and_keys_that_are_changed_on_the_way_are_changed_as_one(tiny: Tiny, padding: str, steps: list[str]) -> None:
    model = ready(traced_as(tiny), padding)
    done = check_pass(MergeQkv(), model, prompt(model))
    assert (done.count, done.skipped) == (2, ())
    for step in steps:
        made = user_nodes(model.graph.nodes, getattr(torch.ops.calque, step).default)
        assert [node.args[-1] for node in made] == [6, 6]
    assert len(user_nodes(model.graph.nodes, torch.ops.aten.split_with_sizes.default)) == 4


def test_weight_of_normed_heads_is_repeated_for_each() -> None:
    model = ready(traced_as(QWEN3_16), "any")
    one, other = (model.weights[f"model.layers.0.self_attn.{kind}_norm.weight"] for kind in "qk")
    MergeQkv().apply(model)
    weight = model.weights["model.layers.0.self_attn.q_norm.weight.heads"]
    assert torch.equal(weight.read(), torch.cat([one.read().repeat(4), other.read().repeat(2)]))


def test_layer_without_rotation_is_merged_beside_one_with_it() -> None:
    tiny = Tiny("cohere2", extra={"pad_token_id": 0, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8})
    model = ready(traced_as(tiny), "any")
    done = check_pass(MergeQkv(), model, prompt(model))
    assert (done.count, done.skipped) == (2, ())
    assert len(user_nodes(model.graph.nodes, torch.ops.calque.flat_rotary.default)) == 1


WIDTH, SIZE = 8, 4
PLACES = {"q": (0, 8), "k": (8, 12), "v": (12, 16)}


ANGLES, SCALES = torch.arange(12.0).reshape(2, 3, 2), torch.arange(1.0, 5.0)
turn, norm = torch.ops.calque.flat_rotary.default, torch.ops.calque.flat_rms_norm.default
# What is done to queries and keys that are no one value then.
STEPS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "angles": lambda q, k: (turn(q, ANGLES.cos(), ANGLES.sin(), False, 4, 2), turn(k, ANGLES.sin(), ANGLES.cos(), False, 4, 1)),
    "pairs": lambda q, k: (turn(q, ANGLES.cos(), ANGLES.sin(), True, 4, 2), turn(k, ANGLES.cos(), ANGLES.sin(), False, 4, 1)),
    "keys-alone": lambda q, k: (q, norm(k, SCALES, 1e-5, 1)),
    "epsilons": lambda q, k: (norm(q, SCALES, 1e-5, 2), norm(k, SCALES, 1e-6, 1)),
}


class Attend(nn.Module):
    """An attention whose queries, keys and values come about in ``form``; what else it gives reads the same."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.form = form
        self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=form == "biased" or (form == "bias" and size == 8)) for size in (8, 4, 4))
        self.k = self.v if form == "one-weight" else self.k
        self.whole = nn.Linear(WIDTH, 20, bias=False)

    def projected(self, x: Tensor) -> list[Tensor]:
        whole = self.whole(x)[..., : 20 if self.form == "not-to-its-end" else 16] * 1.5
        if self.form == "sizes":
            return list(whole.split([8, 4, 4], -1))
        if self.form == "unordered-split":
            k, v, q = whole.split([4, 4, 8], -1)
            return [q, k, v]
        if self.form in ("slices", "not-to-its-end"):
            return [whole[..., start:end] for start, end in PLACES.values()]
        if self.form == "overlapping":
            return [whole[..., :8], whole[..., 8:12], whole[..., 8:12]]
        if self.form == "two-wholes":
            return [whole[..., :8], whole[..., 8:12], (whole + 1)[..., 12:]]
        q, k = self.q(x), self.k(x)
        if self.form in STEPS:
            q, k = STEPS[self.form](q, k)
        return [q, k, self.v(x * 2 if self.form == "another-value" else x)]

    def forward(self, x: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        bias = torch.ops.calque.mask_bias(ops.visible(x.new_ones(x.shape[0], 5).bool(), 2, 3, 5, "causal", 0))
        q, k, v = self.projected(x)
        rest = (None, None, None, None, 2, 1, 0.5, 0.0, 0, False)
        found: list[Tensor] = list(torch.ops.calque.grouped_attention(q, k, v, past_key, past_value, bias, *rest))
        if self.form == "read-elsewhere":
            found[0] = found[0] + q
        if self.form == "weight-elsewhere":
            found[0] = found[0] + self.q.weight.sum()
        return tuple(found)


def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (2, 3, WIDTH), "past_key": (2, 1, 2, SIZE), "past_value": (2, 1, 2, SIZE)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", ["plain", "biased", "sizes", "slices"])
def test_written_form_is_one_value_of_all_three(form: str) -> None:
    model = small(Attend(form), given(), {})
    assert check_pass(MergeQkv(), model, arrays(given())).count == 1
    (attention,) = user_nodes(model.graph.nodes, grouped)
    assert attention.args[1:3] == (None, None)
    assert attention.args[0].meta["val"].shape[2] == 16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("bias", BIASES), ("another-value", VALUES), ("read-elsewhere", APART), ("weight-elsewhere", TIED), ("one-weight", TIED),
        ("unordered-split", APART), ("not-to-its-end", APART), ("overlapping", APART), ("two-wholes", APART),
        *((form, APART) for form in STEPS),
    ],
)  # fmt: skip
def test_what_cannot_be_one_product_is_left_and_the_reason_given(form: str, reason: str) -> None:
    assert left_alone(MergeQkv(), small(Attend(form), given(), {})) == {reason}


def test_tied_weight_is_left_and_the_reason_given() -> None:
    model = small(Attend("plain"), given(), {})
    model.weights = replace(model.weights, entries=model.weights.entries | {"k.weight": model.weights["v.weight"]})
    assert left_alone(MergeQkv(), model) == {TIED}
