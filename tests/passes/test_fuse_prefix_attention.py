from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calque import passes
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.cache_static import CacheStatic
from calque.passes.fuse_prefix_attention import FusePrefixAttention
from calque.traced import TracedModel, user_nodes
from calque.traced_session import TracedSession
from tests.passes.check_pass import ROUNDING, check_pass, histogram
from tests.passes.test_cache_static import fed, slots_of, static
from tests.tiny_models import traced

PREFIX = "calque.prefix_attention.default"


def one_call(model: TracedModel) -> dict[str, NDArray[Any]]:
    """Two rows of equal length over slots that hold what was left there."""
    ids = np.random.default_rng(3).integers(3, 200, (2, 7))
    return fed(ids, [0, 0], [7, 7]) | slots_of(model, 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3-longrope"])
def test_every_attention_under_a_causal_mask_is_told_lengths(name: str) -> None:
    model = static(name)
    done = check_pass(FusePrefixAttention(), model, one_call(model))
    assert (done.count, done.skipped) == (2, ())
    assert histogram(model)[PREFIX] == 2
    assert not user_nodes(model.graph.nodes, torch.ops.calque.attention_mask.default)


def test_rows_of_unequal_length_go_on_from_their_own_slots() -> None:
    """Padding is written past a row's tokens, and the lengths count it: no token sees it all the same."""
    before, after = static("llama"), static("llama")
    passes.run_one(FusePrefixAttention(), after)
    ids = np.random.default_rng(5).integers(3, 200, (2, 12))
    calls = [fed(ids[:, :8], [0, 0], [8, 3]), fed(ids[:, 8:], [8, 3], [12, 7])]
    told = []
    for model in (before, after):
        session, kept = TracedSession(model), slots_of(model, 2)
        answers = []
        for inputs in calls:
            out = session("model", inputs | kept)
            kept = {state.input: out[state.output] for state in model.states}
            answers.append(out["logits"])
        told.append(np.concatenate([answers[0][0], answers[0][1, :3], answers[1][0], answers[1][1]]))
    assert np.abs(told[0] - told[1]).max() <= ROUNDING * told[0].std()


@pytest.mark.parametrize(
    ("name", "left", "why"),
    [
        ("gemma3_text", 2, "its mask is sliding, of 8"),
        ("mistral", 2, "its mask is sliding, of 8"),
        ("gemma2", 2, "its scores are capped"),
        ("gpt_oss", 2, "it has sinks"),
    ],
)
def test_what_hides_more_than_a_length_says_is_left(name: str, left: int, why: str) -> None:
    model = static(name)
    attentions = histogram(model)["calque.attention.default"]
    done = passes.run_one(FusePrefixAttention(), model)
    assert (done.count, len(done.skipped)) == (attentions - left, left)
    assert {reason for _, reason in done.skipped} == {why}


def test_it_comes_after_slots_and_leaves_a_cache_that_grows() -> None:
    with pytest.raises(Exception, match="cache_static"):
        passes.check_order([FusePrefixAttention(), CacheStatic()])
    model = traced("llama")
    passes.run([CacheDynamic()], model)
    assert FusePrefixAttention().apply(model).count == 0
