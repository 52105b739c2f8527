"""Encoders, shrunken, through the whole gate: every task of one type, and every type's plain encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calque.artifact import REPORT, Artifact
from calque.errors import CalqueError, Unsupported, WeightMismatch
from calque.pipeline import convert
from calque.recipe import Recipe
from tests.tiny_encoders import ENCODERS, encoder_config, save_encoder, save_pooling

COMMON = {
    "single-prompt", "ragged-left", "ragged-right", "batch-2", "batch-5", "untraced-length", "length-1", "length-1-left", "length-1-right",
}  # fmt: skip
# Positions are learned there, counted from the mask or the tokens: the table's end is a limit, driven to and past.
TABLES = {"bert", "albert", "electra", "distilbert", "roberta", "mpnet"}
# Their pooler reads the first column, whatever the mask says of it.
RIGHT = {"bert", "albert", "roberta", "mpnet"}


def converted(model: Path, out: Path, **settings: Any) -> Artifact:
    return convert(Recipe(model=str(model), target="onnxruntime", **settings), out)


def statuses(artifact: Artifact) -> dict[str, str]:
    return {row["name"]: row["status"] for row in json.loads((artifact.folder / REPORT).read_text())["scenarios"]}


# Types whose small models take as long to prove as all others together, and those that are bert but for a name or two.
LEFT = ("deberta", "mpnet", "electra", "distilbert")


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=pytest.mark.slow if name in LEFT else ()) for name in ENCODERS])
def test_shrunken_encoder_passes_the_whole_gate(model_type: str, tmp_path: Path) -> None:
    artifact = converted(save_encoder(tmp_path / "model", model_type), tmp_path / "out", task="feature-extraction")
    assert artifact.proof.numerics.worst is not None
    assert artifact.proof.numerics.worst < 1e-4
    found = statuses(artifact)
    extra = {"full-length", "past-full-length"} if model_type in TABLES else {"full-length"}
    assert found.keys() >= COMMON
    assert extra <= found.keys() or model_type == "t5"
    assert set(found.values()) == {"passed"}
    assert artifact.limits.padding == ("right" if model_type in RIGHT else "any")
    assert artifact.states == ()
    outputs = artifact.graphs["model"].outputs
    assert outputs[0].name == "last_hidden_state"
    assert outputs[0].shape == ("batch_size", "sequence_length", 64)


OUTPUTS = {
    "fill-mask": {"logits": ("batch_size", "sequence_length", 211)},
    "text-classification": {"logits": ("batch_size", 2)},
    "token-classification": {"logits": ("batch_size", "sequence_length", 2)},
    "question-answering": {"start_logits": ("batch_size", "sequence_length"), "end_logits": ("batch_size", "sequence_length")},
    "feature-extraction": {"last_hidden_state": ("batch_size", "sequence_length", 64), "pooler_output": ("batch_size", 64)},
}
HEADS = {
    "fill-mask": "BertForMaskedLM",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "feature-extraction": "BertModel",
}


# The outputs of one are shaped as those of fill-mask, and those of the other are asked for by name above.
SHOWN = ("token-classification", "feature-extraction")


@pytest.mark.parametrize("task", [pytest.param(task, marks=pytest.mark.slow if task in SHOWN else ()) for task in OUTPUTS])
def test_task_is_inferred_from_the_architecture_and_its_head_converted(task: str, tmp_path: Path) -> None:
    artifact = converted(save_encoder(tmp_path / "model", "bert", task, architectures=[HEADS[task]]), tmp_path / "out")
    graph = artifact.graphs["model"]
    assert {spec.name: spec.shape for spec in graph.outputs} == OUTPUTS[task]
    assert [spec.name for spec in graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert artifact.limits.max_length == 64
    assert artifact.proof.numerics.status == "passed"


def test_features_of_a_checkpoint_with_another_head_leave_the_pooler_out(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert", "fill-mask", architectures=["BertForMaskedLM"])
    artifact = converted(model, tmp_path / "out", task="feature-extraction")
    assert [spec.name for spec in artifact.graphs["model"].outputs] == ["last_hidden_state"]


def test_head_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert", "feature-extraction", architectures=["BertForPreTraining"])
    with pytest.raises(WeightMismatch, match=r"cls\.predictions"):
        converted(model, tmp_path / "out", task="fill-mask")
    assert not (tmp_path / "out").exists()


def test_head_of_another_task_is_refused_though_its_names_fit(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert", "text-classification", architectures=["BertForSequenceClassification"])
    with pytest.raises(Unsupported, match=r"BertForSequenceClassification.* is no model for token-classification"):
        converted(model, tmp_path / "out", task="token-classification")


def test_layer_that_the_config_does_not_know_is_no_other_head(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert", "fill-mask", architectures=["BertForMaskedLM"])
    encoder_config("bert", num_hidden_layers=1, architectures=["BertForMaskedLM"]).save_pretrained(model)
    with pytest.raises(WeightMismatch, match=r"layer\.1\."):
        converted(model, tmp_path / "out", task="feature-extraction")


@pytest.mark.parametrize(("kinds", "normalize"), [(("Pooling", "Normalize"), True), (("Pooling",), False)])
def test_sentence_encoder_gives_what_its_modules_say(kinds: tuple[str, ...], normalize: bool, tmp_path: Path) -> None:
    model = save_pooling(save_encoder(tmp_path / "model", "bert"), *kinds, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    artifact = converted(model, tmp_path / "out")
    assert [spec.name for spec in artifact.graphs["model"].outputs] == ["token_embeddings", "sentence_embedding"]
    assert artifact.passes["pool_sentences"] == 1
    assert set(statuses(artifact).values()) == {"passed"}
    assert (artifact.folder / "1_Pooling" / "config.json").is_file()


def test_pooling_can_be_listed_in_a_recipe(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert")
    artifact = converted(model, tmp_path / "out", passes=({"pool_sentences": {"pooling": "max", "normalize": False}}, "transpose_linear"))
    assert artifact.graphs["model"].outputs[1].name == "sentence_embedding"


@pytest.mark.parametrize(
    ("kinds", "config", "named"),
    [
        (("Pooling", "Dense"), {"pooling_mode_mean_tokens": True}, "Dense"),
        (("Pooling",), {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "one pooling mode"),
        (("Pooling",), {"pooling_mode_mean_tokens": True, "include_prompt": False}, "prompt"),
        (("Normalize",), {}, "no pooling"),
    ],
)
def test_modules_that_the_graph_cannot_hold_are_refused_by_name(
    kinds: tuple[str, ...], config: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = save_pooling(save_encoder(tmp_path / "model", "bert"), *kinds, **config)
    with pytest.raises(CalqueError, match=named) as caught:
        converted(model, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert "Fix: " in str(caught.value)


def test_sentence_task_without_pooling_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"modules.json"):
        converted(save_encoder(tmp_path / "model", "bert"), tmp_path / "out", task="sentence-similarity")


def test_logits_of_an_encoder_are_never_cut(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="keeps no states"):
        converted(save_encoder(tmp_path / "model", "bert"), tmp_path / "out", logits="last")
