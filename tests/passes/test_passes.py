from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calque import passes
from calque.errors import RecipeError, UsageError
from calque.passes import Pass, Rewrites
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.cache_static import CacheStatic
from calque.passes.keep_last_logits import KeepLastLogits
from calque.passes.transpose_linear import TransposeLinear
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel
from tests.passes.check_pass import ROUNDING
from tests.tiny_models import answers, prompt, traced


@dataclass(frozen=True)
class Needy:
    after: ClassVar[frozenset[str]] = frozenset({"cache_dynamic", "keep_last_logits"})

    def apply(self, model: TracedModel) -> Rewrites:
        return Rewrites(0)


def test_names_are_those_of_the_files() -> None:
    assert passes.names() == [
        "cache_dynamic", "cache_static", "cast_precision", "drop_zero_bias", "fuse_experts", "fuse_gelu", "fuse_grouped_attention",
        "fuse_layer_norm", "fuse_prefix_attention", "fuse_residual_norm", "fuse_rms_norm", "fuse_rotary", "keep_last_logits",
        "lay_out_integers", "merge_gate_up", "merge_qkv", "pack_panels", "pack_weights", "pool_sentences", "quantize_activations",
        "quantize_weights", "simplify_shapes", "transpose_linear",
    ]  # fmt: skip


@pytest.mark.parametrize("name", passes.names())
def test_pass_is_a_frozen_dataclass_found_by_its_name(name: str) -> None:
    made: Any = passes.load(name)
    assert passes.name_of(made) == name
    assert made.after <= set(passes.names())
    assert type(made).__dataclass_params__.frozen
    fields(made)


@pytest.mark.parametrize("name", passes.names())
def test_documentation_shows_the_graph_before_and_after(name: str) -> None:
    text = import_module(f"calque.passes.{name}").__doc__ or ""
    assert "before" in text
    assert "after" in text


def test_unknown_pass_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        passes.load("everything")
    assert str(caught.value) == f"RecipeError: there is no pass 'everything'\nFix: passes: {', '.join(passes.names())}"


def test_unknown_option_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        passes.load("keep_last_logits", {"keeps": "last", "also": 1})
    assert str(caught.value) == "RecipeError: pass keep_last_logits has no option also, keeps\nFix: its options: keep"
    with pytest.raises(RecipeError, match="its options: none"):
        passes.load("cache_dynamic", {"x": 1})


def test_plan_is_read_from_names_and_names_with_options() -> None:
    plan = passes.read_plan(["cache_dynamic", {"keep_last_logits": {"keep": "dynamic"}}, {"transpose_linear": {}}])
    assert plan == (CacheDynamic(), KeepLastLogits("dynamic"), TransposeLinear())


def test_two_passes_that_settle_the_cache_are_refused() -> None:
    plans: list[list[Pass]] = [[CacheDynamic(), CacheStatic()], [CacheStatic(), CacheDynamic()]]
    for plan in plans:
        with pytest.raises(UsageError, match="cannot work") as caught:
            passes.check_order(plan)
        assert caught.value.where == ("cache_dynamic and cache_static both settle the cache, and only the first of them would",)


def test_order_is_checked_and_all_that_is_missing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as caught:
        passes.check_order([CacheDynamic(), Needy()])
    assert caught.value.where == (f"{passes.name_of(Needy())} needs keep_last_logits before it",)
    passes.check_order([CacheDynamic(), KeepLastLogits(), Needy()])


def test_run_counts_by_name_and_verifies_after_each() -> None:
    model = traced("llama")
    counts = passes.run([CacheDynamic(), TransposeLinear(), CacheDynamic()], model)
    assert counts == {"cache_dynamic": 4, "transpose_linear": 15}


def test_pass_that_leaves_the_graph_unsound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(_: CacheDynamic, model: TracedModel) -> Rewrites:
        model.outputs = ()
        return Rewrites(1)

    monkeypatch.setattr(CacheDynamic, "apply", apply)
    with pytest.raises(AssertionError, match="outputs and their names differ"):
        passes.run([CacheDynamic()], traced("llama"))


ALL: list[Pass] = [CacheDynamic(), KeepLastLogits("last"), TransposeLinear()]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(plan=st.permutations(ALL), name=st.sampled_from(["llama", "gpt2", "gemma2"]))
def test_passes_keep_the_last_logits_in_any_order(plan: list[Pass], name: str) -> None:
    model = traced(name)
    inputs = prompt(model)
    expected = answers(model, inputs)["logits"][:, -1:]
    passes.run(plan, model)
    got = answers(model, inputs)["logits"]
    assert abs(got - expected).max() <= ROUNDING * expected.std()


@pytest.mark.parametrize(
    ("precision", "listed"),
    [
        ("int4", []),
        ("fp32", ["quantize_weights", "cache_dynamic", "pack_weights"]),
        ("int4", [{"quantize_weights": {"bits": 8}}, "cache_dynamic", "pack_weights"]),
        ("int8-static", [{"quantize_weights": {"bits": 8, "group": 0}}, "cache_dynamic", "lay_out_integers"]),
    ],
)
def test_a_list_that_stores_weights_otherwise_than_the_precision_says_is_refused(precision: str, listed: list[Any]) -> None:
    with pytest.raises(UsageError, match=f"precision: {precision} and the list of passes disagree"):
        passes.check_precision(precision, passes.read_plan(listed), OnnxRuntime().passes(precision))


def test_a_list_may_choose_the_group_of_its_precision() -> None:
    plan = passes.read_plan([{"quantize_weights": {"bits": 4, "group": 64}}, "cache_dynamic", "pack_weights"])
    passes.check_precision("int4", plan, OnnxRuntime().passes("int4"))
