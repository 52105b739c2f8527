from __future__ import annotations

import math

import pytest

from calque import passes
from calque.choices import AS_ASKED
from calque.facts import count_parameters, source_facts, unquantized_notes, weights_by_layer
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.transpose_linear import TransposeLinear
from tests.tiny_models import TINY, source_of, traced

EMBEDDING = {"llama": "embeddings", "gemma3_text": "embeddings and head (tied)", "gpt2": "embeddings"}


@pytest.mark.parametrize("name", TINY)
def test_the_groups_hold_every_byte_once(name: str) -> None:
    model = traced(name)
    passes.run([CacheDynamic(), TransposeLinear()], model)
    groups = weights_by_layer(model)
    assert sum(group["bytes"] for group in groups) == model.weights.nbytes()
    assert sum(group["parameters"] for group in groups) == count_parameters(model)
    layers = [group for group in groups if group["layer"] is not None]
    assert [group["layer"] for group in layers] == list(range(len(layers)))
    assert len(layers) == source_of(name).config.num_hidden_layers
    assert all(group["name"].endswith(f".{group['layer']}") for group in layers)
    assert {group["name"] for group in groups if group["layer"] is None} <= {"embeddings", "embeddings and head (tied)", "norm", "head"}


def test_embeddings_norm_and_head_are_named_in_the_order_of_the_model() -> None:
    assert [group["name"] for group in weights_by_layer(traced("llama"))] == [
        "embeddings", "model.layers.0", "model.layers.1", "norm", "head",
    ]  # fmt: skip


def test_a_tied_head_is_counted_with_the_embeddings() -> None:
    groups = {group["name"]: group for group in weights_by_layer(traced("gemma3_text"))}
    config = source_of("gemma3_text").config
    assert groups["embeddings and head (tied)"]["parameters"] == config.vocab_size * config.hidden_size
    assert "head" not in groups


def test_weights_that_are_not_quantized_as_the_rest_are_named_once_a_reason_unless_they_were_to_stay() -> None:
    skipped = [("a", AS_ASKED), ("b", "is odd"), ("c", "is odd"), ("d", "is even")]
    assert unquantized_notes(skipped) == ["Not quantized as the rest: 2 (b, c): is odd.", "Not quantized as the rest: 1 (d): is even."]


def test_the_source_is_said_with_its_type_task_parameters_and_dtype() -> None:
    source, model = source_of("llama"), traced("llama")
    facts = source_facts(source, {"id": "x", "revision": None, "sha256": "0"}, count_parameters(model))
    stored = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    assert facts == {
        "id": "x", "revision": None, "sha256": "0", "model_type": "llama", "task": "text-generation-with-past",
        "parameters": stored, "dtype": "float32",
    }  # fmt: skip
