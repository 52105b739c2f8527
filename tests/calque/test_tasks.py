from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig, DeiTConfig, LlamaConfig, T5Config, ViTConfig

from calque import converters, tasks
from calque.converters import causal_lm
from calque.errors import Unsupported, UsageError


def test_task_is_found_by_its_name_and_by_optimums_synonyms() -> None:
    assert tasks.find("text-generation").name == tasks.find("text-generation-with-past").name == "text-generation-with-past"
    assert tasks.find("sequence-classification").name == "text-classification"
    assert converters.load(tasks.find("text-generation")) is causal_lm.trace


@pytest.mark.parametrize(
    ("config", "pooled", "expected"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), False, "text-generation-with-past"),
        (LlamaConfig(), False, "text-generation-with-past"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), False, "text-classification"),
        (BertConfig(), False, "feature-extraction"),
        (BertConfig(is_decoder=True), False, "text-generation-with-past"),
        (BertConfig(), True, "sentence-similarity"),
        (BertConfig(architectures=["BertModel"]), True, "sentence-similarity"),
        (BertConfig(architectures=["BertModel"]), False, "feature-extraction"),
        (BertConfig(architectures=["BertForMaskedLM"]), True, "fill-mask"),
        (BertConfig(architectures=["BertForTokenClassification"]), False, "token-classification"),
        (BertConfig(architectures=["BertForQuestionAnswering"]), False, "question-answering"),
        (ViTConfig(architectures=["ViTForImageClassification"]), False, "image-classification"),
        (DeiTConfig(architectures=["DeiTForImageClassificationWithTeacher"]), False, "image-classification"),
        (ViTConfig(), False, "image-classification"),
    ],
)
def test_task_is_inferred_from_architectures_or_type(config: Any, pooled: bool, expected: str) -> None:
    assert tasks.infer(config, pooled).name == expected


OTHER_HEADS = [T5Config(architectures=["T5ForConditionalGeneration"]), ViTConfig(architectures=["ViTForMaskedImageModeling"])]


@pytest.mark.parametrize("config", OTHER_HEADS)
def test_architecture_of_no_converter_is_unsupported_by_name(config: Any) -> None:
    with pytest.raises(Unsupported) as caught:
        tasks.infer(config, False)
    assert config.architectures[0] in str(caught.value)


def test_unknown_task_is_bad_usage_and_known_one_without_converter_unsupported() -> None:
    with pytest.raises(UsageError, match="fil-mask"):
        tasks.find("fil-mask")
    with pytest.raises(Unsupported, match="object-detection"):
        tasks.find("object-detection")


@pytest.mark.parametrize(
    ("task", "architecture", "fits"),
    [
        ("text-classification", "BertForSequenceClassification", True),
        ("token-classification", "BertForSequenceClassification", False),
        ("question-answering", "BertForTokenClassification", False),
        ("fill-mask", "BertModel", False),
        ("fill-mask", "BertForPreTraining", True),
        ("feature-extraction", "BertForSequenceClassification", True),
        ("text-generation", "LlamaForCausalLM", True),
        ("text-classification", "LlamaForCausalLM", False),
    ],
)
def test_checkpoint_is_read_for_the_head_it_was_saved_with_and_for_features(task: str, architecture: str, fits: bool) -> None:
    assert tasks.find(task).reads([architecture]) is fits
