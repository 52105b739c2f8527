"""The gate catches what is wrong in an encoder's artifact, output by output, and lets through what is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from calque.artifact import Artifact
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.runtime import open_session
from calque.validation.compare import Row, compare
from calque.validation.drive import ModelIO
from calque.validation.reference import read_references
from tests.tiny_encoders import save_encoder, save_pooling
from tests.validation.gate import Broken

Arrays = dict[str, Any]
Run = Callable[[Arrays], Arrays]
_KEPT: list[TemporaryDirectory[str]] = []


@cache
def sentence_encoder() -> Artifact:
    _KEPT.append(TemporaryDirectory(ignore_cleanup_errors=True))
    folder = Path(_KEPT[-1].name)
    model = save_pooling(save_encoder(folder / "model", "bert"), "Pooling", "Normalize", pooling_mode="mean")
    return convert(Recipe(model=str(model), target="onnxruntime"), folder / "out")


def failed(change: Callable[[Arrays, Run], Arrays]) -> dict[str, Row]:
    """The scenarios that fail once the session is tampered with, by name."""
    artifact = sentence_encoder()
    session = Broken(open_session(artifact.folder), change)
    rows = [compare(session, ModelIO.of(artifact), scenario, expected) for scenario, expected in read_references(artifact.folder)]
    assert len(rows) == 11
    return {row["name"]: row for row in rows if row["status"] == "failed"}


def mask_ignored(inputs: Arrays, run: Run) -> Arrays:
    return run({**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])})


def segments_ignored(inputs: Arrays, run: Run) -> Arrays:
    return run({**inputs, "token_type_ids": np.zeros_like(inputs["token_type_ids"])})


def pooled_over_padding(inputs: Arrays, run: Run) -> Arrays:
    outputs = run(inputs)
    sentence = outputs["token_embeddings"].mean(axis=1)
    return {**outputs, "sentence_embedding": sentence / np.linalg.norm(sentence, axis=1, keepdims=True)}


def not_normalized(inputs: Arrays, run: Run) -> Arrays:
    outputs = run(inputs)
    return {**outputs, "sentence_embedding": outputs["sentence_embedding"] * 1.001}


def one_column_late(inputs: Arrays, run: Run) -> Arrays:
    outputs = run(inputs)
    return {**outputs, "token_embeddings": np.roll(outputs["token_embeddings"], 1, axis=1)}


def rows_swapped(inputs: Arrays, run: Run) -> Arrays:
    outputs = run(inputs)
    return {**outputs, "sentence_embedding": outputs["sentence_embedding"][::-1]}


def other_token_at_padding(inputs: Arrays, run: Run) -> Arrays:
    return run({**inputs, "input_ids": np.where(inputs["attention_mask"] == 1, inputs["input_ids"], 7)})


RAGGED = {"ragged-left", "ragged-right", "length-1-left", "length-1-right"}
EVEN = {"single-prompt", "batch-2", "batch-5", "untraced-length", "full-length"}


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (mask_ignored, RAGGED),
        (segments_ignored, RAGGED | EVEN),
        (pooled_over_padding, RAGGED),
        (not_normalized, RAGGED | EVEN | {"length-1"}),
        (one_column_late, RAGGED | EVEN),
        (rows_swapped, RAGGED | {"batch-2", "batch-5"}),
        (other_token_at_padding, set()),
    ],
)
def test_fault_is_caught_in_the_scenarios_that_can_show_it(change: Callable[[Arrays, Run], Arrays], caught: set[str]) -> None:
    assert failed(change).keys() == caught


def test_failure_names_the_output() -> None:
    assert "(sentence_embedding)" in str(failed(pooled_over_padding)["ragged-left"]["reason"])


def test_output_that_is_missing_or_misshapen_fails_with_its_name() -> None:
    without = failed(lambda inputs, run: {"token_embeddings": run(inputs)["token_embeddings"]})
    assert without["single-prompt"]["reason"] == "output sentence_embedding is missing"
    flat = failed(lambda inputs, run: {**run(inputs), "sentence_embedding": np.zeros(3, np.float32)})
    assert flat["single-prompt"]["reason"] == "sentence_embedding has shape [3], [1, 64] expected"


def test_eager_model_is_asked_for_every_length_anew() -> None:
    references = {scenario.name: expected for scenario, expected in read_references(sentence_encoder().folder)}
    short, long = references["single-prompt"]["token_embeddings"], references["untraced-length"]["token_embeddings"]
    same = np.arange(7)
    assert np.abs(short.tables[0, False].at(same).values - long.tables[0, False].at(same).values).max() > 0.01
