"""A shrunken config is small, keeps every kind of layer, and can show a fault."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from calque import shrink
from calque.errors import UsageError
from calque.features import EXPERTS, HEADS, KV_HEADS, features
from calque.shrink import kinds_of_layers, shrunken, small_fields, variants

CAUSAL = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(variants()))
ENCODERS = sorted(set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 300
MOST_LAYERS = 8


def text_config(name: str) -> Any:
    return shrunken(name, causal=True).get_text_config(decoder=True)


def first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_sizes_of_a_shrunken_config_are_small(name: str) -> None:
    config = text_config(name)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
        value = getattr(config, field, None)
        assert value is None or max(value if isinstance(value, list) else [value]) <= LARGEST, field
    layers = getattr(config, "num_hidden_layers", None)
    assert layers is None or 2 <= layers <= MOST_LAYERS


@pytest.mark.parametrize("name", CAUSAL)
def test_shrunken_heads_outnumber_their_keys_and_values(name: str) -> None:
    config = text_config(name)
    heads, groups = first(config, HEADS), first(config, KV_HEADS)
    if heads is None or groups is None or getattr(config, "kv_lora_rank", None) or name in ("doge", "falcon-alibi", "whisper"):
        pytest.skip("one size alone, or every head has a key and value of its own by design")
    assert groups < heads


@pytest.mark.parametrize("name", CAUSAL)
def test_every_kind_of_layer_survives_shrinking(name: str) -> None:
    small = text_config(name)
    row = shrink.overrides().get(name, {})
    model_type = row.get("type", name)
    whole = CONFIG_MAPPING[model_type](**row.get("start", {})).get_text_config(decoder=True)
    for field in ("layer_types", "mlp_layer_types", "attention_layers", "layers_block_type", "no_rope_layers", "indexer_types"):
        if getattr(whole, field, None) is not None and field not in row.get("fields", {}):
            assert set(getattr(small, field)) == set(getattr(whole, field)), field


@pytest.mark.parametrize("name", CAUSAL)
def test_windows_and_experts_of_a_shrunken_config_bite(name: str) -> None:
    config = text_config(name)
    for field in ("sliding_window", "attention_chunk_size", "window_size"):
        value = getattr(config, field, None)
        assert not isinstance(value, int) or value <= shrink.WINDOW, field
    chosen, experts = getattr(config, "num_experts_per_tok", None), first(config, EXPERTS)
    if isinstance(chosen, int) and experts:
        assert chosen < experts


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "glm", "mistral", "deepseek_v3", "llama4_text"])
def test_head_size_is_not_what_hidden_over_heads_gives(name: str) -> None:
    config = text_config(name)
    assert config.head_dim != config.hidden_size // config.num_attention_heads


def test_first_layer_of_each_kind_is_kept_in_order() -> None:
    kinds = ["sliding", "sliding", "full", "sliding", "sliding", "full"]
    assert kinds_of_layers({"layer_types": kinds}, 6) == [0, 2]
    assert kinds_of_layers({"layer_types": kinds, "first_k_dense_replace": 1}, 6) == [0, 1, 2]
    assert kinds_of_layers({"layer_types": kinds, "num_kv_shared_layers": 3}, 6) == [0, 2, 3, 5]
    assert kinds_of_layers({"layer_types": kinds, "mlp_only_layers": [4]}, 6) == [0, 2, 4]
    assert kinds_of_layers({}, 6) == [0, 1]


def test_lists_and_borders_are_cut_with_the_layers() -> None:
    table = {
        "num_hidden_layers": 6,
        "layer_types": ["a", "a", "b", "a", "a", "b"],
        "first_k_dense_replace": 1,
        "moe_layers": [1, 2, 3, 4, 5],
        "num_attention_heads_per_layer": [16, 16, 32, 16, 16, 32],
        "per_layer_config": {"2": {"head_dim": 512}, "5": {"head_dim": 512}},
    }
    small = small_fields(table)
    assert small["num_hidden_layers"] == 3
    assert small["layer_types"] == ["a", "a", "b"]
    assert small["first_k_dense_replace"] == 1
    assert small["moe_layers"] == [1, 2]
    assert small["per_layer_config"] == {"2": {"head_dim": shrink.HEAD_DIM}}


def test_nested_configs_shrink_like_the_outer_one() -> None:
    config: Any = shrunken("gemma3", causal=True)
    assert config.text_config.hidden_size == shrink.HIDDEN
    assert config.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert config.vision_config.hidden_size == shrink.HIDDEN


def test_latent_attention_keeps_a_key_for_every_head_and_its_rotary_size() -> None:
    config: Any = shrunken("deepseek_v3")
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.qk_rope_head_dim


def test_either_kind_of_model_is_made_causal_where_it_is_asked_for() -> None:
    assert shrunken("bert", causal=True).is_decoder
    assert not shrunken("bert").is_decoder


def test_overrides_say_why_and_name_types_that_exist() -> None:
    for name, row in shrink.overrides().items():
        assert row["why"], name
        assert row.get("type", name) in CONFIG_MAPPING, name
        assert row.keys() <= {"why", "type", "tasks", "start", "fields"}, name
        assert ("type" in row) == ("tasks" in row), name


def test_unknown_type_is_a_usage_error_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean `llama`"):
        shrunken("lama")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", ["GQA"]),
        ("deepseek_v3", ["MLA", "top 2 of 8 experts"]),
        ("gemma2", ["GQA", "sliding window", "softcap"]),
        ("gemma3n_text", ["GQA", "sliding window", "KV shared across layers", "softcap"]),
        ("llama4_text", ["GQA", "chunked", "top 1 of 8 experts"]),
        ("phi3-longrope", ["GQA", "RoPE longrope"]),
        ("bloom", ["MHA", "ALiBi"]),
        ("lfm2", ["GQA", "convolution"]),
    ],
)
def test_features_name_what_is_unusual(name: str, words: list[str]) -> None:
    assert features(shrunken(name, causal=True)) == words
