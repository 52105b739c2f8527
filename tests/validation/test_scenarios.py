from __future__ import annotations

import numpy as np
import pytest

from calque.artifact import Limits
from calque.validation.scenarios import PAD, Scenario, build, calls, pad, unknown

ANY = Limits()


def names(limits: Limits, **options: object) -> list[str]:
    return [s.name for s in build(limits, 100, **options)]  # type: ignore[arg-type]


def test_every_row_is_a_prefix_of_its_pool_sequence() -> None:
    pool: dict[int, tuple[int, ...]] = {}
    for scenario in build(Limits(recompute_at=20, max_length=64), 100, windows={8, 16}):
        for row, tokens in enumerate(scenario.rows):
            known = pool.get(row, ())
            longer, shorter = (tokens, known) if len(tokens) > len(known) else (known, tokens)
            assert longer[: len(shorter)] == shorter
            pool[row] = longer
    assert len(pool) == 5
    assert len({tokens[:4] for tokens in pool.values()}) == 5


def test_the_same_arguments_give_the_same_scenarios() -> None:
    assert build(ANY, 100, windows={8}) == build(ANY, 100, windows={8})
    assert build(ANY, 100) != build(ANY, 100, seed=1)


def test_excluded_tokens_are_never_fed() -> None:
    fed = {token for s in build(ANY, 50, excluded=range(10)) for row in s.rows for token in row}
    assert min(fed) >= 10


def test_what_must_be_covered_is_there() -> None:
    found = {s.name: s for s in build(Limits(recompute_at=16, max_length=40), 100, windows={8})}
    assert {found[f"ragged-{side}"].decode for side in ("left", "right")} == {8}
    assert {len(s.rows) for s in found.values()} >= {1, 2, 5}
    assert any(s.prompts == (1,) for s in found.values())
    assert any(1 in s.prompts and len(s.prompts) > 1 for s in found.values())
    for side in ("left", "right"):
        past = found[f"past-window-8-{side}"]
        assert any(prompt > 8 for prompt in past.prompts)
        assert any(prompt < 8 < prompt + past.decode for prompt in past.prompts)
    assert max(len(row) for row in found["full-length"].rows) == 40
    assert found["past-full-length"].refuse == "max_length: 40"
    assert found["continued-past-16"].refuse == "recompute_at: 16"


def test_nothing_lawful_goes_past_the_ceiling() -> None:
    for scenario in build(Limits(max_length=12), 100, windows={8, 20}, max_positions=100):
        assert scenario.refuse or max(len(row) for row in scenario.rows) <= 12
    assert all(max(len(row) for row in s.rows) <= 30 for s in build(ANY, 100, max_positions=30))


@pytest.mark.parametrize(
    ("limits", "refused"),
    [
        (ANY, set()),
        (Limits(padding="right"), {"ragged-left", "chunked-prefill-left", "length-1-left", "past-window-8-left"}),
        (
            Limits(padding="none"),
            {"ragged-left", "ragged-right", "chunked-prefill-left", "length-1-left", "length-1-right"}
            | {"past-window-8-left", "past-window-8-right"},
        ),
        (Limits(batched_chunk=False), {"chunked-prefill-batch", "chunked-prefill-left"}),
    ],
)
def test_what_the_limits_forbid_becomes_a_refusal(limits: Limits, refused: set[str]) -> None:
    assert {s.name for s in build(limits, 100, windows={8}) if s.refuse} == refused


def test_without_padding_windows_are_still_crossed_row_by_row() -> None:
    assert {"past-window-8", "across-window-8"} <= set(names(Limits(padding="none"), windows={8}))


def test_rows_too_long_to_try_are_named_not_dropped() -> None:
    found = {s.name: s for s in build(ANY, 100, windows={4096}, longest=1000)}
    assert "needs rows of 4109 tokens" in found["past-window-4096-left"].not_run
    assert found["past-window-4096-left"].rows == ()


def test_a_long_prompt_is_cut_where_its_logits_would_be_large() -> None:
    found = {s.name: s for s in build(ANY, 262144, windows={512})}
    assert len(found["past-window-512-left"].chunks) > 1
    assert sum(found["past-window-512-left"].chunks) == 517
    whole = {s.name: s for s in build(Limits(batched_chunk=False), 262144, windows={512})}
    assert whole["past-window-512-left"].chunks == ()


def test_padding_lays_each_row_at_its_side() -> None:
    lengths = np.array([2, 3])
    assert pad(lengths, "left").tolist() == [[PAD, 0, 1], [0, 1, 2]]
    assert pad(lengths, "right").tolist() == [[0, 1, PAD], [0, 1, 2]]


def test_calls_cover_each_position_once_where_nothing_is_recomputed() -> None:
    for scenario in build(ANY, 100, windows={8}):
        seen: dict[int, list[int]] = {row: [] for row in range(len(scenario.prompts))}
        for number, call in enumerate(calls(scenario)):
            assert call.fresh == (number == 0)
            for row, index in enumerate(call.index):
                seen[row] += index[index != PAD].tolist()
        assert all(seen[row] == list(range(len(tokens))) for row, tokens in enumerate(scenario.rows))


def test_the_call_that_crosses_the_threshold_starts_over() -> None:
    scenario = Scenario("s", "", ((1, 2, 3, 4, 5), (1, 2, 3)), (3, 1), "left", decode=2, recompute_at=3)
    first, second, third = calls(scenario)
    assert first.fresh
    assert first.beyond == (False, False)
    assert second.fresh
    assert second.index.tolist() == [[0, 1, 2, 3], [PAD, PAD, 0, 1]]
    assert second.beyond == (True, False)
    assert not third.fresh
    assert third.index.tolist() == [[4], [2]]
    # The second row crosses later, and takes the whole batch with it.
    later = list(calls(Scenario("s", "", ((1,) * 9, (1,) * 7), (3, 1), "left", decode=6, recompute_at=3)))
    assert [call.fresh for call in later] == [True, True, False, True, False, False, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": ((1, 2),), "prompts": (2,), "decode": 1},
        {"rows": ((1, 2),), "prompts": (2,), "chunks": (1,)},
        {"rows": ((1, 2), (1,)), "prompts": (2, 1)},
    ],
)
def test_a_scenario_that_contradicts_itself_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="scenario s"):
        Scenario(**{"name": "s", "why": "", **wrong})  # type: ignore[arg-type]


def test_every_name_that_can_be_built_is_known_and_a_typo_is_not() -> None:
    built = names(Limits(recompute_at=16, max_length=40), windows={8, 16}) + names(Limits(padding="none"), windows={8})
    built += names(ANY, max_positions=64, cached=False) + names(Limits(padding="right", batched_chunk=False))
    assert unknown(built) == {}
    assert {"past-window-8", "across-window-8", "beyond-16", "across-16-right", "continued-past-16", "past-full-length"} <= set(built)
    typos = ["ragged-letf", "batch-3", "past-window-x-left", "single-prompt ", "all"]
    assert list(unknown([*typos, "batch-2"])) == typos
    assert unknown(typos)["ragged-letf"] == "; did you mean `ragged-left`?"


def test_slots_are_filled_to_the_last_however_many() -> None:
    limits = Limits(padding="right", max_length=3000)
    assert "full-length" not in {scenario.name for scenario in build(limits, 100)}
    found = {scenario.name: scenario for scenario in build(limits, 100, in_slots=True)}
    assert [max(len(row) for row in found[name].rows) for name in ("full-length", "full-length-right")] == [3000, 3000]
    assert found["past-full-length"].refuse == "max_length: 3000"
    assert "full-length-right" not in {scenario.name for scenario in build(Limits(padding="right", max_length=7), 100, in_slots=True)}


def test_calls_of_padding_alone_are_lawful_in_slots() -> None:
    limits = Limits(padding="right", max_length=64)
    refused = [
        {scenario.name for scenario in build(limits, 100, in_slots=slots) if scenario.padding == "left" and scenario.refuse}
        for slots in (False, True)
    ]
    assert refused[0] - refused[1] == {"chunked-prefill-left"}
    assert "ragged-left" in refused[1]
