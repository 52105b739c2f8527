"""Models of every kind as Core ML packages, through the whole pipeline and its gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import calque
from calque import pipeline
from calque.errors import Unsupported
from calque.recipe import Parity, Recipe
from calque.runtime.coreml_session import INTERPRETER
from tests.tiny_encoders import save_encoder, save_pooling
from tests.tiny_models import TYPES
from tests.tiny_models import save_random as save_decoder
from tests.tiny_vision import CLASSIFIERS
from tests.tiny_vision import save_random as save_classifier

pytest.importorskip("coremltools")

PRECISIONS = ("fp32", "fp16", "int8", "int4")
ENCODERS = ("bert", "roberta", "distilbert", "albert", "mpnet", "modernbert", "nomic_bert", "t5", "deberta-v2")
# At near ties float16 chooses other experts than float32, on any target.
ROUTED = ("gpt_oss", "mixtral", "qwen3_moe")
DECODERS = tuple(name for name in TYPES if name not in ROUTED)
STATEFUL = ("llama", "qwen3", "gemma3_text", "phi3", "phi3-longrope", "gpt2")


def source(name: str, folder: Path) -> str:
    if name == "quill":
        return "builtin:quill"
    if name == "minilm":
        save_encoder(folder, "bert", task="sentence-similarity")
        return str(save_pooling(folder, "Pooling", "Normalize", word_embedding_dimension=64, pooling_mode_mean_tokens=True))
    if name in CLASSIFIERS:
        return str(save_classifier(folder, name))
    return str(save_decoder(TYPES[name], folder) if name in TYPES else save_encoder(folder, name))


def proved(name: str, precision: Any, folder: Path, *scenarios: str, **options: Any) -> calque.Artifact:
    task = "sentence-similarity" if name == "minilm" else None
    parity = Parity(scenarios=scenarios) if scenarios else Parity()
    recipe = Recipe(model=source(name, folder / "source"), task=task, target="coreml", precision=precision, options=options, parity=parity)
    artifact = calque.convert(recipe, folder / "out")
    assert (artifact.proof.numerics.status, artifact.proof.numerics.by) == ("passed", INTERPRETER)
    assert {artifact.proof.build.status, artifact.proof.execution.status} == {"not_run"}
    assert artifact.damaged_files() == []
    assert artifact.tools["coremltools"]
    return artifact


@pytest.mark.parametrize("name", ["vit", "minilm"])
def test_an_encoder_is_proved(name: str, tmp_path: Path) -> None:
    artifact = proved(name, "fp16", tmp_path)
    outputs = [tensor.name for tensor in artifact.graphs["model"].outputs]
    assert outputs == (["logits"] if name == "vit" else ["token_embeddings", "sentence_embedding"])


CASES = [(name, precision) for name in ("quill", "minilm", *DECODERS, *ENCODERS, *CLASSIFIERS) for precision in PRECISIONS]


def test_ways_to_keep_a_cache_are_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="cannot express") as caught:
        proved("vit", "fp16", tmp_path, cache="stateful", functions="split")
    why = "the model keeps no keys and values from call to call"
    assert caught.value.where == (f"cache: stateful: {why}", f"functions: split: {why}")


def test_a_plan_says_where_rows_end(tmp_path: Path) -> None:
    recipe = Recipe(model=source("llama", tmp_path), target="coreml", precision="fp16")
    assert pipeline.plan(recipe)["limits"]["max_length"] == 128


def test_more_rows_than_the_package_takes_at_once_are_several_calls(tmp_path: Path) -> None:
    proved("llama", "fp32", tmp_path, "ragged-left", "batch-5", max_batch=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_model_is_proved_in_every_precision(name: str, precision: str, tmp_path: Path) -> None:
    proved(name, precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTED)
def test_a_model_of_experts_is_proved_in_fp32(name: str, tmp_path: Path) -> None:
    proved(name, "fp32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_model_with_states_is_proved(name: str, precision: str, tmp_path: Path) -> None:
    artifact = proved(name, precision, tmp_path, cache="stateful", functions="split")
    assert list(artifact.graphs) == ["prefill", "decode"]


@pytest.mark.slow
def test_integers_that_are_not_symmetric_are_proved(tmp_path: Path) -> None:
    proved("llama", "int4", tmp_path, **{"quantize_weights.symmetric": False})


@pytest.mark.slow
def test_a_length_that_is_computed_of_values_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        proved("deberta", "fp32", tmp_path)
    assert any("depends on the values of a call" in line and "modeling_deberta.py" in line for line in caught.value.where)
