from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import pytest
import torch

from calque import passes
from calque.converters import encoder
from calque.errors import RecipeError, Unsupported
from calque.passes.pool_sentences import Pooling, PoolSentences
from calque.source import ModelSource
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from tests.tiny_encoders import VOCABULARY, save_encoder
from tests.tiny_models import traced

MODES = get_args(Pooling)
_KEPT: list[TemporaryDirectory[str]] = []


@cache
def source() -> ModelSource:
    _KEPT.append(TemporaryDirectory(ignore_cleanup_errors=True))
    folder = Path(_KEPT[-1].name)
    return ModelSource.resolve(str(save_encoder(folder, "bert")), task="feature-extraction", scratch=folder)


@cache
def shared() -> TracedModel:
    return encoder.trace(source())


ROWS = np.random.default_rng(3).integers(3, VOCABULARY, (3, 7))
LENGTHS = (7, 1, 4)


def padded(side: str) -> dict[str, Any]:
    mask = np.zeros((3, 7), dtype=np.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    ids = np.where(mask == 1, ROWS, 0)
    if side == "left":
        for row, length in enumerate(LENGTHS):
            ids[row], mask[row] = np.roll(ids[row], 7 - length), np.roll(mask[row], 7 - length)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", MODES)
def test_each_row_gets_the_eager_models_pooling_of_itself_alone(pooling: Any, normalize: bool) -> None:
    rewrite, model = PoolSentences(pooling, normalize), shared().copy()
    assert passes.run_one(rewrite, model).count == 1
    assert [spec.name for spec in model.outputs] == ["token_embeddings", "sentence_embedding"]
    assert model.outputs[1].shape == ("batch_size", 64)
    eager = source().load_eager()
    for side in ("right", "left"):
        got = TracedSession(model)("model", padded(side))["sentence_embedding"]
        for row, length in enumerate(LENGTHS):
            with torch.inference_mode():
                hidden = eager(input_ids=torch.from_numpy(ROWS[row : row + 1, :length])).last_hidden_state[0].numpy()
            expected = rewrite.expected({"last_hidden_state": hidden})["sentence_embedding"]
            np.testing.assert_allclose(got[row], expected, atol=2e-5 * np.abs(expected).max())
            if normalize:
                assert np.linalg.norm(got[row]) == pytest.approx(1, abs=1e-5)


def test_second_run_changes_nothing() -> None:
    model = shared().copy()
    passes.run_one(PoolSentences(), model)
    code = str(model.graph)
    assert passes.run_one(PoolSentences(), model).count == 0
    assert str(model.graph) == code


def test_modes_differ_from_each_other() -> None:
    hidden = {"last_hidden_state": np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)}
    found = [PoolSentences(mode, False).expected(hidden)["sentence_embedding"] for mode in MODES]
    for i, one in enumerate(found):
        assert not any(np.allclose(one, other) for other in found[i + 1 :])


def test_model_without_hidden_states_is_refused() -> None:
    with pytest.raises(Unsupported, match="last_hidden_state"):
        passes.run_one(PoolSentences(), traced("llama"))


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(RecipeError, match="pooling"):
        passes.load("pool_sentences", {"pooling": "average"})
