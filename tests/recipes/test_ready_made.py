"""Every recipe of the repository, followed to its end on a small model of the same architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from calque.fastest import candidate
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.runtime import open_session
from calque.validation.report import Report
from tests.recipes.small_configs import CONFIGS, read_shrunken

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
QUILL = "builtin:quill"
# Each shares its model with a recipe of the quick run, and its target and precision with another, or with tests of its target.
SHOWN = {
    "quill-onnxruntime-int4", "Llama-3.2-1B-Instruct-onnxruntime-fp32", "Qwen3-0.6B-onnxruntime-fp32",
    "SmolLM2-135M-Instruct-onnxruntime-fp32", "quill-torchscript-int8", "quill-aotinductor-int8", "quill-cpu-int8",
}  # fmt: skip

# What sets a model apart, so that it must be asked for it.
TELLING = {
    "google/gemma-3-270m-it": {"past-window-8-left", "past-window-8-right"},
    "microsoft/Phi-4-mini-instruct": {"beyond-32", "across-32-left", "continued-past-32"},
}


def test_every_model_of_a_recipe_has_a_small_config() -> None:
    assert {Recipe.read(path).model for path in RECIPES} == {QUILL, *CONFIGS}


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SHOWN else ()) for path in RECIPES]
)
def test_a_recipe_makes_a_proved_artifact_of_a_small_model(path: Path, tmp_path: Path) -> None:
    asked = Recipe.read(path)
    name = asked.model.rpartition("/")[2]
    artifact = convert(read_shrunken(path, tmp_path / name), tmp_path / "out")
    rows = Report.read(artifact.folder).scenarios
    assert artifact.proof.numerics.status == "passed"
    # What a GPU or a Mac would have to run stays open; nothing that ran failed.
    assert artifact.proof.execution.status == ("not_run" if asked.target in ("tensorrt", "coreml") else "passed")
    assert artifact.proof.build.status != "failed"
    assert {row["status"] for row in rows} == {"passed"}
    expected = {"single-image", "batch-5-turned"} if asked.task == "image-classification" else {"ragged-left", "ragged-right"}
    assert {*expected, "batch-5", *TELLING.get(asked.model, ())} <= {row["name"] for row in rows}
    followed = candidate(asked, artifact.target) if asked.target == "cpu" else asked
    assert artifact.recipe == {**followed.as_manifest(), "model": name, "random_weights": asked.model != QUILL}
    outputs = {spec.name for spec in next(iter(artifact.graphs.values())).outputs if not spec.name.startswith("present.")}
    pooled = asked.task == "sentence-similarity"
    assert outputs == ({"token_embeddings", "sentence_embedding"} if pooled else {"logits"})
    assert bool(artifact.states) is (asked.task not in ("sentence-similarity", "image-classification"))
    assert artifact.damaged_files() == []
    open_session(artifact.folder)
