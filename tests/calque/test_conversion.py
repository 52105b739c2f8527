from __future__ import annotations

from typing import Any

import pytest

from calque import conversion, passes, recipe_names
from calque.errors import RecipeError, UsageError
from calque.passes.quantize_weights import QuantizeWeights
from calque.recipe import Recipe

GIVEN = {"model": "builtin:quill", "target": "onnxruntime", "precision": "int4"}


def planned(**settings: Any) -> QuantizeWeights:
    """The pass that the recipe's plan quantizes with."""
    recipe = Recipe.of({**GIVEN, **settings}, names=recipe_names.problems)
    plan = conversion.plan_of(recipe, conversion.open_target(recipe))
    return next(rewrite for rewrite in plan if isinstance(rewrite, QuantizeWeights))


def test_option_with_a_dot_is_that_of_the_pass_and_the_rest_stay_the_targets() -> None:
    found = planned(options={"quantize_weights.group": "64", "quantize_weights.symmetric": "false", "activations": "float32"})
    assert found == QuantizeWeights(bits=4, group=64, symmetric=False)


def test_mapping_is_given_whole_or_entry_by_entry() -> None:
    options = {"quantize_weights.overrides": {"*.down_proj.weight": "int8"}, "quantize_weights.overrides.lm_head.weight": "keep"}
    assert planned(options=options).overrides == {"*.down_proj.weight": "int8", "lm_head.weight": "keep"}


def test_what_is_not_given_is_what_the_precision_says() -> None:
    assert planned(precision="int8", options={"quantize_weights.head": "int4"}) == QuantizeWeights(bits=8, group=0, head="int4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize_weigths.group": 64}, "there is no pass 'quantize_weigths'; did you mean `quantize_weights`?"),
        ({"quantize_weights.grop": 64}, "pass quantize_weights has no option grop; did you mean `group`?"),
        ({"quantize_weights.group": 65}, "must be 16, 32, 64, 128, 256, or 0"),
        ({"quantize_weights.group.x": 64}, "group: Input should be a valid integer"),
        (
            {"quantize_weights.overrides.lm_head.weight": "int5"},
            "lm_head.weight: Input should be 'keep', 'int4', 'int8' or 'fp8'",
        ),
        ({"quantize_weights.overrides": "int8", "quantize_weights.overrides.x": "int8"}, "given as 'int8' and entry by entry"),
        ({"cast_precision.arithmetic": "narrow"}, "cast_precision is not among the passes of this target and precision"),
    ],
    ids=str,
)
def test_option_that_no_pass_can_take_is_refused_with_the_nearest_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(options=options)
    (line,) = caught.value.where
    assert line.startswith(f"options.{next(iter(options))}: ")
    assert said in line


def test_every_pass_with_a_fault_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        planned(options={"quantize_weights.grop": 64, "merge_qvk.x": 1, "pack_weights.bits": 4})
    assert len(caught.value.where) == 3


def test_option_of_a_pass_beside_a_list_of_passes_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        planned(passes=["cache_dynamic"], options={"quantize_weights.group": 64})
    assert caught.value.where == ("options: quantize_weights.group: 64",)


def test_pass_that_is_not_in_the_plan_is_refused_without_a_recipes_check() -> None:
    with pytest.raises(UsageError, match="cast_precision is not among"):
        passes.with_options((QuantizeWeights(),), {"cast_precision.arithmetic": "narrow"})
