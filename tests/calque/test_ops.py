from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from calque import ops

calque = torch.ops.calque
BATCH, HEADS, KV_HEADS, QUERIES, KEYS, SIZE, VALUE_SIZE = 2, 4, 2, 3, 7, 8, 6


def tensors(kv_heads: int = KV_HEADS, value_size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return draw(BATCH, HEADS, QUERIES, SIZE), draw(BATCH, kv_heads, KEYS, SIZE), draw(BATCH, kv_heads, KEYS, value_size)


def some_mask() -> Tensor:
    mask = torch.rand(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[..., 0] = True
    return mask


def lower_right() -> Tensor:
    return torch.tensor([[key <= query + KEYS - QUERIES for key in range(KEYS)] for query in range(QUERIES)])[None, None]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Attention in float64, one query at a time, by its definition."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            group = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                scores = (k[b, group].double() @ q[b, h, i].double()) * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                shares = torch.exp(scores) * mask[b, 0, i]
                total = shares.sum() + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                out[b, h, i] = (shares / total) @ v[b, group].double()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [SIZE**-0.5, 0.3])
def test_attention_equals_torchs_with_grouped_heads(kv_heads: int, scale: float) -> None:
    q, k, v = tensors(kv_heads)
    ours = calque.attention(q, k, v, some_mask(), scale, 0.0, None, True)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, some_mask(), scale=scale, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("value_size", [SIZE, VALUE_SIZE])
def test_attention_equals_its_definition_with_softcap_and_sinks(softcap: float, sinks: Tensor | None, value_size: int) -> None:
    q, k, v = tensors(value_size=value_size)
    ours = calque.attention(q, k, v, some_mask(), 0.7, softcap, sinks, True)
    torch.testing.assert_close(ours.double(), by_hand(q, k, v, some_mask(), 0.7, softcap, sinks), rtol=1e-5, atol=1e-6)


def test_causality_is_lower_right_where_there_is_no_mask() -> None:
    q, k, v = tensors()
    expected = calque.attention(q, k, v, lower_right().expand(BATCH, -1, -1, -1), 0.5, 0.0, None, True)
    assert torch.equal(calque.attention(q, k, v, None, 0.5, 0.0, None, True), expected)


def test_every_key_is_seen_without_mask_and_causality() -> None:
    q, k, v = tensors()
    everything = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    assert torch.equal(calque.attention(q, k, v, None, 0.5, 0.0, None, False), calque.attention(q, k, v, everything, 0.5, 0.0, None, False))


def test_causal_hint_changes_nothing_beside_a_mask() -> None:
    q, k, v = tensors()
    assert torch.equal(
        calque.attention(q, k, v, some_mask(), 0.5, 0.0, None, True), calque.attention(q, k, v, some_mask(), 0.5, 0.0, None, False)
    )


def test_scores_stay_finite_in_a_row_that_sees_nothing() -> None:
    q, k, v = tensors()
    nothing = torch.zeros(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    assert torch.isfinite(calque.attention(q, k, v, nothing, 0.5, 0.0, None, True)).all()


# A row of five tokens, two slots of right padding left in the cache, then two more tokens: positions 0-4, 5 and 6.
GAP = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)


def seen_slots(kind: str, window: int) -> list[list[int]]:
    seen = ops.visible(GAP, 7, 2, 9, kind, window)
    assert seen.shape == (1, 1, 2, 9)
    return [row.nonzero().flatten().tolist() for row in seen[0, 0]]


def test_causal_mask_skips_padding_and_sees_itself() -> None:
    assert seen_slots("causal", 0) == [[0, 1, 2, 3, 4, 7], [0, 1, 2, 3, 4, 7, 8]]


def test_sliding_window_reaches_over_the_gap_that_right_padding_leaves() -> None:
    assert seen_slots("sliding", 3) == [[3, 4, 7], [4, 7, 8]]


def test_chunks_are_cut_by_true_positions() -> None:
    assert seen_slots("chunked", 3) == [[3, 4, 7], [8]]


def test_bidirectional_mask_sees_all_but_padding() -> None:
    assert seen_slots("bidirectional", 0) == [[0, 1, 2, 3, 4, 7, 8]] * 2


def test_padded_query_sees_its_own_slot() -> None:
    padded = ops.visible(torch.zeros(1, 4, dtype=torch.bool), 1, 3, 4, "sliding", 2)
    assert torch.equal(padded[0, 0], torch.eye(4, dtype=torch.bool)[1:])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    mask=st.lists(st.booleans(), min_size=2, max_size=12).filter(any),
    past=st.integers(0, 11),
    kind=st.sampled_from(["causal", "sliding", "chunked", "bidirectional"]),
    window=st.integers(1, 5),
)
def test_padded_row_is_masked_as_if_it_stood_alone(mask: list[bool], past: int, kind: str, window: int) -> None:
    past = min(past, len(mask) - 1)
    real = [slot for slot, valid in enumerate(mask) if valid]
    queries = [slot for slot in real if slot >= past]
    padded = ops.visible(torch.tensor([mask]), past, len(mask) - past, len(mask), kind, window)[0, 0]
    alone_past = len(real) - len(queries)
    alone = ops.visible(torch.ones(1, len(real), dtype=torch.bool), alone_past, len(queries), len(real), kind, window)[0, 0]
    rows = torch.tensor([slot - past for slot in queries], dtype=torch.int64)
    assert torch.equal(padded[rows][:, real], alone)
    hidden = [slot for slot, valid in enumerate(mask) if not valid]
    assert not padded[rows][:, hidden].any()


@pytest.mark.parametrize("past", [0, 4])
def test_cache_update_appends_the_new_positions(past: int) -> None:
    held, new = torch.randn(2, 2, past, 3), torch.randn(2, 2, 3, 3)
    whole = calque.cache_update(held, new, "0.key")
    assert torch.equal(whole[:, :, :past], held)
    assert torch.equal(whole[:, :, past:], new)


def test_mask_operator_gives_the_full_mask_whatever_it_says_of_it() -> None:
    full = some_mask()
    assert torch.equal(calque.attention_mask(full, None, "sliding", 3), full)


@pytest.mark.parametrize(("count", "kept"), [(0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])])
def test_keep_last_keeps_the_count_and_all_for_zero(count: int, kept: list[int]) -> None:
    hidden = torch.randn(2, 4, 5)
    assert torch.equal(calque.keep_last(hidden, torch.tensor(count)), hidden[:, kept])


def grouped(mask: Tensor | None) -> tuple[Any, ...]:
    """Arguments of a grouped attention of three new tokens over four: all three beside each other, or turned by tables."""
    generator = torch.Generator().manual_seed(4)
    packed = torch.randn(BATCH, QUERIES, (HEADS + 2 * KV_HEADS) * SIZE, generator=generator)
    past = [torch.randn(BATCH, KV_HEADS, KEYS - QUERIES, SIZE, generator=generator) for _ in range(2)]
    rest = (HEADS, KV_HEADS, 0.5, 2.0)
    if mask is not None:
        return (packed, None, None, *past, calque.mask_bias(mask), None, None, None, torch.zeros(HEADS), *rest, 0, False)
    parts = torch.split(packed, [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE], 2)
    held, tables = torch.ones(BATCH, KEYS, dtype=torch.int64), torch.randn(2, KEYS, SIZE // 2, generator=generator)
    return (*(part.contiguous() for part in parts), *past, None, held, *tables, None, *rest, 2, True)


SAMPLES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "cache_update": (calque.cache_update.default, (torch.randn(2, 2, 4, 3), torch.randn(2, 2, 1, 3), "0.key")),
    "attention_mask": (calque.attention_mask.default, (some_mask(), None, "causal", 0)),
    "attention": (calque.attention.default, (*tensors(value_size=VALUE_SIZE), some_mask(), 0.5, 2.0, torch.zeros(HEADS), True)),
    "attention_causal": (calque.attention.default, (*tensors(), None, 0.5, 0.0, None, True)),
    "rms_norm": (calque.rms_norm.default, (torch.randn(2, 3, SIZE), torch.randn(SIZE), 1e-5)),
    "add_rms_norm": (calque.add_rms_norm.default, (torch.randn(2, 3, SIZE), torch.randn(2, 3, SIZE), torch.randn(SIZE), 1e-5)),
    "add_layer_norm": (calque.add_layer_norm.default, (torch.randn(2, 3, SIZE), torch.randn(2, 3, SIZE), torch.randn(SIZE), None, 1e-5)),
    "rotary": (calque.rotary.default, (torch.randn(2, 4, 3, SIZE), torch.randn(2, 3, 2), torch.randn(2, 3, 2), True, 4)),
    "flat_rotary": (calque.flat_rotary.default, (torch.randn(2, 3, 4 * SIZE), torch.randn(2, 3, 4), torch.randn(2, 3, 4), False, 8, 4)),
    "flat_rms_norm": (calque.flat_rms_norm.default, (torch.randn(2, 3, 4 * SIZE), torch.randn(SIZE), 1e-5, 4)),
    "split_heads": (calque.split_heads.default, (torch.randn(2, 3, 4 * SIZE), 4)),
    "join_heads": (calque.join_heads.default, (torch.randn(2, 3, 4, SIZE),)),
    "mask_bias": (calque.mask_bias.default, (some_mask(),)),
    "padding_bias": (calque.padding_bias.default, (torch.ones(BATCH, KEYS, dtype=torch.bool), torch.randn(BATCH, QUERIES, 2))),
    "quick_gelu": (calque.quick_gelu.default, (torch.randn(2, 3), 1.702)),
    "grouped_attention": (calque.grouped_attention.default, grouped(some_mask())),
    "grouped_attention_by_held_tokens": (calque.grouped_attention.default, grouped(None)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_follows_the_reference(name: str) -> None:
    operator, arguments = SAMPLES[name]
    outcome = torch.library.opcheck(operator, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


def test_fake_of_keep_last_has_a_length_of_its_own() -> None:
    # Its length depends on data, which opcheck's dynamic test cannot follow; schema and fake can still be checked.
    outcome = torch.library.opcheck(
        calque.keep_last.default, (torch.randn(2, 4, 5), torch.tensor(2)), test_utils=("test_schema", "test_faketensor")
    )
    assert set(outcome.values()) == {"SUCCESS"}


def test_shapes_are_known_without_data() -> None:
    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 3, 8), torch.empty(2, 2, 7, 8), torch.empty(2, 2, 7, 6)
        assert calque.attention(q, k, v, None, 1.0, 0.0, None, True).shape == (2, 4, 3, 6)
        assert calque.cache_update(k, k[:, :, :1], "0.key").shape == (2, 2, 8, 8)
