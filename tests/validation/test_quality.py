from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calque.errors import SourceUnreadable
from calque.validation.drive import ModelIO
from calque.validation.eager import eager_draft, eager_outputs
from calque.validation.quality import (
    LARGEST_LOSS,
    NEW_TOKENS,
    PROMPT,
    Answer,
    Baseline,
    Draft,
    Row,
    continuing,
    session_answer,
    session_continue,
)
from tests.validation.gate import gate

ROWS = [tuple(int(token) for token in np.random.default_rng(row).integers(3, 200, 24)) for row in range(3)]


def says(*logits: NDArray[np.float32]) -> Answer:
    """A model that answers row number n, whose first token is n, with the n-th logits."""
    return lambda row: {"logits": logits[row[0]]}


def of(*probabilities: list[float]) -> NDArray[np.float32]:
    return np.log(np.array(probabilities, dtype=np.float32))


def baseline(answer: Answer, rows: list[Row], folder: Path, **settings: Any) -> Baseline:
    return Baseline.keep(answer, rows, folder, **{"causal": True, "text": True, **settings}, longest=1)  # 1: nothing is continued


def test_divergence_perplexity_and_top_token_of_known_distributions(tmp_path: Path) -> None:
    original = of([0.1, 0.9], [0.5, 0.5], [0.75, 0.25])
    other = of([0.9, 0.1], [0.25, 0.75], [0.25, 0.75]) + np.float32(3.0)  # what all logits share says nothing
    found = baseline(says(original), [(0, 1, 1)], tmp_path).compare(says(other))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75)
    assert found.positions == 2  # not the first token's
    assert found.kl_mean == pytest.approx((first + second) / 2, rel=1e-6)
    assert found.kl_worst == pytest.approx(second, rel=1e-6)
    # The second position predicts the third token, 1; the last predicts none of the row.
    assert found.original_perplexity == pytest.approx(1 / 0.5, rel=1e-6)
    assert found.perplexity == pytest.approx(1 / 0.75, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(0.5 / 0.75, rel=1e-6)
    assert found.near_ties == 1  # the original preferred neither at the second position
    assert found.top1_agree == 0.0  # and of the one that is left, another token
    assert found.data()["perplexity_ratio"] == found.perplexity_ratio


def test_random_tokens_have_no_perplexity(tmp_path: Path) -> None:
    logits = of([0.1, 0.9], [0.4, 0.6])
    found = baseline(says(logits), [(0, 1)], tmp_path, text=False).compare(says(logits))
    assert found.kl_mean == 0.0
    assert found.perplexity is None
    assert found.original_perplexity is None
    assert found.perplexity_ratio is None


def test_a_model_that_keeps_the_last_logits_is_judged_on_those(tmp_path: Path) -> None:
    original = of([0.1, 0.9], [0.5, 0.5], [0.75, 0.25])
    found = baseline(says(original), [(0, 1, 1)], tmp_path).compare(says(original[-1:]))
    assert found.positions == 1
    assert found.kl_mean == 0.0
    assert found.perplexity is None


def test_a_hopeless_model_has_a_finite_perplexity(tmp_path: Path) -> None:
    original = of([0.5, 0.5], [0.5, 0.5], [0.5, 0.5])
    other = np.array([[0, 0], [1e6, 0], [0, 0]], dtype=np.float32)
    found = baseline(says(original), [(0, 1, 1)], tmp_path).compare(says(other))
    assert found.perplexity == math.exp(LARGEST_LOSS)


def test_rows_may_be_few(tmp_path: Path) -> None:
    same, other = of([0.5, 0.5], [0.6, 0.4]), of([0.5, 0.5], [0.1, 0.9])
    kept = baseline(says(same, same), [(0, 1), (1, 1)], tmp_path)
    assert kept.compare(says(same, other), rows=1).kl_mean == 0.0
    assert (kept.compare(says(same, other)).kl_mean or 0.0) > 0.1


def test_encoders_are_judged_by_cosine_and_every_position(tmp_path: Path) -> None:
    outputs: dict[str, NDArray[np.float32]] = {"hidden": np.array([[1, 0], [0, 1]], np.float32), "unknown": np.ones(3, np.float32)}
    turned: dict[str, NDArray[np.float32]] = {"hidden": np.array([[0, 1], [0, 1]], np.float32)}
    kept = baseline(lambda row: outputs, [(0, 1)], tmp_path, causal=False)
    assert kept.compare(lambda row: outputs).cosine_worst == pytest.approx(1.0)
    found = kept.compare(lambda row: turned)
    assert found.cosine_mean == pytest.approx(0.5)
    assert found.loss == pytest.approx(0.5)
    assert found.kl_mean is None
    assert kept.greedy(continuing(lambda row: outputs)) == (None, None)
    labels = baseline(lambda row: {"logits": np.zeros(2, np.float32)}, [(0, 1)], tmp_path, causal=False)
    assert labels.compare(lambda row: {"logits": of([0.9, 0.1])}).kl_mean == pytest.approx(math.log(0.5 / 0.3), rel=1e-6)


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    fine, wrong = of([0.5, 0.5], [0.5, 0.5]), np.array([[0, 0], [0, np.nan]], np.float32)
    with pytest.raises(SourceUnreadable, match="the original model hold NaN"):
        baseline(says(wrong), [(0, 1)], tmp_path)
    with pytest.raises(SourceUnreadable, match="logits of the model that is judged"):
        baseline(says(fine), [(0, 1)], tmp_path).compare(says(wrong))


def eager(model: torch.nn.Module, shuffled: bool = False) -> Answer:
    """A tiny model; its logits at other places of the vocabulary where ``shuffled``."""
    order = np.random.default_rng(1).permutation(211)

    def answer(row: Row) -> Mapping[str, NDArray[np.float32]]:
        logits = eager_outputs(model, row, ())["logits"]
        return {"logits": logits[:, order] if shuffled else logits}

    return answer


def test_the_same_model_is_as_good_and_one_with_a_shuffled_head_is_not(tmp_path: Path) -> None:
    model = gate("llama").model
    kept = Baseline.keep(eager(model), ROWS, tmp_path, causal=True, text=True, layers=2)
    same, shuffled = kept.compare(eager(model)), kept.compare(eager(model, shuffled=True))
    assert (same.kl_mean, same.kl_worst, same.top1_agree, same.perplexity_ratio) == (0.0, 0.0, 1.0, 1.0)
    assert same.positions == 3 * 23
    assert (shuffled.kl_mean or 0.0) > 1.0
    assert (shuffled.top1_agree or 0.0) < 0.2
    everything = 3 * NEW_TOKENS
    assert kept.greedy(continuing(eager(model))) == (everything, everything)
    matched, tokens = kept.greedy(continuing(eager(model, shuffled=True)))
    assert tokens == everything
    assert matched is not None
    assert matched < 3


def test_greedy_decoding_is_the_originals_own(tmp_path: Path) -> None:
    model = gate("llama").model
    kept = Baseline.keep(eager(model), ROWS, tmp_path, causal=True, text=True, longest=20)
    generated: Any = model.generate(torch.tensor([ROWS[0][:PROMPT]]), max_new_tokens=4, do_sample=False, eos_token_id=None)  # type: ignore
    assert [prompt for _, prompt in kept.continued] == [PROMPT] * 3
    assert kept.continued[0][0] == tuple(generated[0].tolist())


def wrong(rows: Sequence[Row], count: int) -> list[Row]:
    """Guesses one token for ever."""
    return [(*row, *[7] * count) for row in rows]


def test_a_guess_changes_how_often_the_original_is_asked_and_nothing_else(tmp_path: Path) -> None:
    model = gate("llama").model
    asked: list[Row] = []

    def answer(row: Row) -> Mapping[str, NDArray[np.float32]]:
        asked.append(row)
        return eager(model)(row)

    drafts: dict[str, Draft] = {"none": lambda rows, count: rows, "its own": partial(eager_draft, model), "wrong": wrong}
    found, calls = {}, {}
    for name, draft in drafts.items():
        asked.clear()
        (tmp_path / name).mkdir()
        found[name] = Baseline.keep(answer, ROWS, tmp_path / name, causal=True, text=True, draft=draft).continued
        calls[name] = len(asked) - len(ROWS)
    assert found["none"] == found["its own"] == found["wrong"]
    assert calls["none"] == len(ROWS) * NEW_TOKENS
    assert calls["its own"] == len(ROWS)
    assert calls["wrong"] <= calls["none"]


def test_a_guess_is_left_where_the_original_gives_the_last_logits_alone(tmp_path: Path) -> None:
    model = gate("llama").model
    plain = Baseline.keep(eager(model), ROWS, tmp_path, causal=True, text=True, longest=20).continued
    last = Baseline.keep(
        lambda row: {"logits": eager(model)(row)["logits"][-1:]},
        ROWS,
        tmp_path,
        causal=True,
        text=True,
        longest=20,
        draft=partial(eager_draft, model),
    ).continued
    assert last == plain


def test_a_model_without_a_cache_is_not_guessed() -> None:
    rows = [(3, 4, 5)]
    assert eager_draft(torch.nn.Linear(2, 2), rows, 4) == rows


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_session_is_driven_row_by_row_and_step_by_step(name: str, tmp_path: Path) -> None:
    found = gate(name)
    io = ModelIO.of(found.artifact)
    kept = Baseline.keep(eager(found.model), ROWS, tmp_path, causal=True, text=True, layers=2, longest=24)
    quality = kept.compare(session_answer(found.session(), io))
    assert (quality.kl_worst or 0.0) < 1e-7
    assert quality.top1_agree == 1.0
    assert kept.greedy(session_continue(found.session(), io)) == (3 * 8, 3 * 8)
