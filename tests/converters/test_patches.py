"""Each patch does what it says, and is still needed: a test fails on the day that upstream no longer needs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calque.artifact import Limits
from calque.converters import patches
from calque.converters.patches import PATCHES, Patch
from tests.tiny_models import TYPES, Tiny, eager_model

THRESHOLD = 32
DYNAMIC = Tiny("llama", extra={"max_position_embeddings": 32, "rope_parameters": {
    "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}})  # fmt: skip
PER_KIND = replace(
    TYPES["gemma3_text"],
    extra={**TYPES["gemma3_text"].extra, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    }},
)  # fmt: skip


def patch(name: str) -> Patch:
    return next(row for row in PATCHES if row.name == name)


def rotary(tiny: Tiny, patched: bool) -> Any:
    model: Any = eager_model(tiny)
    if patched:
        patches.apply(model)
    return model.model.rotary_emb


def ragged_positions() -> Tensor:
    """A short row beside one that passes the threshold."""
    long = torch.arange(THRESHOLD + 8)
    return torch.stack([long.clamp_max(5), long])


def cos_sin(module: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = module(torch.zeros(len(positions), positions.shape[1], 64), positions)
    return cos, sin


def test_patches_have_a_reason_a_link_and_an_end() -> None:
    assert len({row.name for row in PATCHES}) == len(PATCHES)
    for row in PATCHES:
        assert all((row.reason, row.link, row.versions, row.expires))
        assert f"test_{row.name}_has_not_expired" in globals()


@pytest.mark.parametrize("row", [0, 1])
def test_longrope_of_a_row_equals_that_row_alone(row: int) -> None:
    positions = ragged_positions()
    together = cos_sin(rotary(TYPES["phi3-longrope"], patched=True), positions)
    alone = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions[row : row + 1])
    for batch, single in zip(together, alone, strict=True):
        torch.testing.assert_close(batch[row : row + 1], single, rtol=0, atol=0)


@pytest.mark.parametrize(("length", "long"), [(THRESHOLD - 1, False), (THRESHOLD, False), (THRESHOLD + 1, True)])
def test_longrope_changes_at_the_threshold_as_upstream(length: int, long: bool) -> None:
    positions = torch.arange(length)[None]
    patched = cos_sin(rotary(TYPES["phi3-longrope"], patched=True), positions)
    upstream = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions)
    assert torch.equal(patched[0], upstream[0])
    assert torch.equal(patched[1], upstream[1])
    beyond = cos_sin(rotary(TYPES["phi3-longrope"], patched=True), torch.arange(THRESHOLD + 1)[None])[0]
    assert torch.equal(patched[0][:, 1], beyond[:, 1]) == long


def test_longrope_per_row_has_not_expired() -> None:
    positions = ragged_positions()
    together, _ = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions)
    alone, _ = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions[:1])
    assert not torch.equal(together[:1], alone), f"upstream now does this: {patch('longrope_per_row').expires}. Remove the patch"


def test_dynamic_ntk_constant_has_not_expired() -> None:
    module = rotary(DYNAMIC, patched=False)
    inputs = (torch.zeros(2, 5, 64), torch.arange(5).repeat(2, 1))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"x": {0: batch, 1: length}, "position_ids": {0: batch, 1: length}}
    # The day this does not raise, upstream can be exported: remove the patch.
    with pytest.raises((torch._dynamo.exc.UserError, RuntimeError), match=r"data-dependent|Could not guard"):
        torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def test_dynamic_ntk_equals_upstream_up_to_the_trained_length() -> None:
    positions = torch.arange(32)[None]
    patched, upstream = cos_sin(rotary(DYNAMIC, patched=True), positions), cos_sin(rotary(DYNAMIC, patched=False), positions)
    assert torch.equal(patched[0], upstream[0])
    assert torch.equal(patched[1], upstream[1])


@pytest.mark.parametrize(
    ("tiny", "limits", "used"),
    [
        (TYPES["llama"], Limits(), ()),
        (TYPES["phi3-longrope"], Limits(recompute_at=THRESHOLD), ("longrope_per_row",)),
        (DYNAMIC, Limits(max_length=32), ("dynamic_ntk_constant",)),
        (PER_KIND, Limits(max_length=128), ("dynamic_ntk_constant",)),
    ],
    ids=["none", "longrope", "dynamic", "dynamic-of-one-kind"],
)
def test_patches_apply_where_they_are_needed_and_limit_the_artifact(tiny: Tiny, limits: Limits, used: tuple[str, ...]) -> None:
    assert patches.apply(eager_model(tiny)) == (limits, used)
