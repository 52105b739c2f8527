"""Small configs of any model type: every kind of layer kept, and every size small enough to convert in seconds.

A shrunken model must be able to show a fault: fewer key-value heads than heads, a head size that is not hidden / heads, a
window shorter than what is tested, fewer experts chosen than there are. What one type needs besides is data, in shrink.yaml.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.errors import UsageError
from calque.strict_yaml import read_document
from calque.suggest import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OVERRIDES = Path(__file__).with_name("shrink.yaml")

VOCABULARY = 211
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 24
WINDOW = 8
POSITIONS = 128
# Of images where a config does not say it, or takes any: networks that halve an image five times leave two pixels of it.
IMAGE = 64
ROPE_TRAINED = 32

LAYER_COUNTS = re.compile(r"(num_)?(hidden_|encoder_|decoder_)?layers?|n_layers?")

# The first pattern that matches a field's whole name gives the size it is cut to; a smaller one stays.
SIZES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
        (r"hidden_size_per_layer_input", 16),
        (r"(shared_|shared_experts?_|moe_|moe_shared_expert_|expert_|shared_expert_)(intermediate_size|ffn_hidden_size)", 48),
        (r"(encoder_|decoder_|dense_|prefix_dense_)?(intermediate_size|ffn_dim|ffn_hidden_size)(_mlp)?", 96),
        (r"n_inner|dff|dim_ff|d_ff|d_inner|hidden_dim|feed_forward_size", 96),
        (r"d_kv", HEAD_DIM),
        (r"router_hidden_size|hidden_size_per_.*", 16),
        (r"(.*_)?hidden_size|d_model|n_embd|emb_dim|(.*_)?embedding_size|word_embed_proj_dim|embedding_dim|lru_width|dim", HIDDEN),
        (r"(swa_|linear_)?num_(key_value|kv|query_group|key)_?(heads|groups)?", KV_HEADS),
        (r"(swa_|num_|encoder_|decoder_|num_encoder_|num_decoder_|linear_|linear_value_|)attention_heads", HEADS),
        (r"(linear_)?num_(value_)?heads|n_heads?", HEADS),
        (r"linear_num_value_heads", HEADS),
        (r"linear_num_key_heads", KV_HEADS),
        (r"(swa_|linear_|attention_)?head_dim|attention_head_size|d_head|dim_head|kv_channels|linear_(key|value)_head_dim", HEAD_DIM),
        (r"query_pre_attn_scalar", HEAD_DIM),
        (r"rotary_dim", 8),
        (r"q_lora_rank", 32),
        (r"kv_lora_rank|o_lora_rank|qk_nope_head_dim", 16),
        (r"v_head_dim", 12),
        (r"qk_rope_head_dim|index_head_dim|qk_rope_dim", 8),
        (r"qk_head_dim", 24),
        (r"index_n_heads", KV_HEADS),
        (r"index_topk(_blocks)?|index_block_size", WINDOW),
        (r"(num|n|num_local|n_routed|moe_num|zero)_(routed_)?experts?(_num)?", 8),
        (r"(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts)", 2),
        (r"n_group|num_expert_group", 2),
        (r"topk_group", 1),
        (r"(sliding_|attention_)?window(_size)?|sliding_window_size|attention_window_size|local_attention(_window_len)?", WINDOW),
        (r"attention_chunk_size|keep_window_size|floor_scale", WINDOW),
        (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", POSITIONS),
        (r"max_(source|target)_positions", POSITIONS),
        (r"laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank", 8),
        (r"(ssm_|mamba_d_)?state(_size)?|mamba_d_state|d_state", 8),
        (r"mamba_(n|num)_heads", 8),
        (r"mamba_(d_head|head_dim|headdim)", 16),
        (r"mamba_d_ssm", 128),
        (r"(mamba_)?chunk_size", 16),
        (r"d_rel|rel_extent|pooler_.*size", 16),
        (r"(num_)?(key|query)_groups", KV_HEADS),
        (r"encoder_hash_byte_group_vocab|ngram_vocab_size_base", VOCABULARY),
        (r"image_size", 28),
        (r"patch_size", 14),
        (r"(neck_|encoder_)?hidden_sizes", HIDDEN),
        (r"depths", 2),
        (r"ple_embed_dim", 16),
    )
)

# Granite's class leaves scores unscaled, which no published model does: attention saturates and hides what it is given. Not
# head_size ** -0.5 either, so that a lost multiplier shows.
SCALES = {"attention_multiplier": 0.15}

# Flags of the first and of the last so many layers: the layers before and after such a border are of different kinds.
PREFIXES = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
SUFFIXES = ("num_kv_shared_layers",)

# None stands for a size that the model's code fails to fill in, or for the plainest one: a sharper size is given.
NEVER_NONE = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}

# Which stages a backbone gives; its class names them anew after the layers that are left.
STAGE_NAMES = {"stage_names", "out_features", "out_indices", "_out_features", "_out_indices"}

TOKENS = {"pad": 0, "bos": 1, "eos": 2}
OTHER_TOKEN = 3


def shrunken(name: str, causal: bool = False) -> PreTrainedConfig:
    """Return a small config of a model type, or of a variant of one that shrink.yaml names.

    Args:
        name: A type of transformers, or a variant's name.
        causal: Make a type that can be either a decoder.

    Raises:
        UsageError: no such type.
        Exception: whatever the type's own config class makes of the values.
    """
    from transformers import CONFIG_MAPPING

    row = overrides().get(name, {})
    model_type = row.get("type", name)
    if model_type not in CONFIG_MAPPING:
        raise UsageError(f"there is no model type {name!r}{nearest(name, CONFIG_MAPPING)}", fix="`calque conformance --types` takes types")
    config_class = CONFIG_MAPPING[model_type]
    fields = small_fields(_defaults(config_class, row))
    if causal and "is_decoder" in fields:
        fields["is_decoder"] = True
    config: PreTrainedConfig = config_class(**_merged(fields, row.get("fields", {})))
    return config


@cache
def overrides() -> Mapping[str, Mapping[str, Any]]:
    """Return what single types need: ``{name: {why, type?, start?, fields?}}``."""
    table: dict[str, dict[str, Any]] = read_document(OVERRIDES).data
    return table


def variants() -> dict[str, Mapping[str, Any]]:
    """Return the rows of shrink.yaml that add a form of a type beside its default one."""
    return {name: row for name, row in overrides().items() if "type" in row}


def _defaults(config_class: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return every field of the type's default config; ``start`` replaces defaults that its own class refuses."""
    table: dict[str, Any] = config_class(**row.get("start", {})).to_dict()
    return _without_generic(table)


def _without_generic(table: dict[str, Any]) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    generic = set(PreTrainedConfig().to_dict()) - {"is_encoder_decoder"}
    generic |= STAGE_NAMES
    return {key: value for key, value in copy.deepcopy(table).items() if key not in generic or key == "model_type"}


def _merged(fields: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with ``own`` laid over them, tables within tables too; a value of null drops nothing: it is None."""
    for key, value in own.items():
        nested = fields.get(key)
        fields[key] = _merged(nested, value) if isinstance(value, dict) and isinstance(nested, dict) else copy.deepcopy(value)
    return {key: value for key, value in fields.items() if key != "model_type"} if "model_type" in fields else fields


def small_fields(table: dict[str, Any]) -> dict[str, Any]:
    """Return the table with every size cut and its layers thinned to one of each kind, at least two."""
    table = _thinned(table)
    return {key: _small(key, value, table) for key, value in table.items()}


def _small(key: str, value: Any, table: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if "model_type" in value or key.endswith("_config"):
            return small_fields(_without_generic(value))
        return _small_rope(value, table) if key == "rope_parameters" else value
    if re.fullmatch(r".*token_(id|ids|index)|(image|unk|mask|eos|bos|pad)_index", key):
        return _token(key, value)
    if value is None or key in SCALES:
        return SCALES.get(key, NEVER_NONE.get(key))
    if isinstance(value, bool) or not isinstance(value, int):
        return _small_list(key, value)
    if key == "num_key_value_heads" and table.get("kv_lora_rank"):
        return min(value, HEADS)  # latent attention unfolds a key for every head
    if key == "head_dim" and value == table.get("qk_rope_head_dim"):
        key = "qk_rope_head_dim"
    return min(value, size) if (size := _size(key)) else value


def _size(key: str) -> int | None:
    return next((size for pattern, size in SIZES if pattern.fullmatch(key)), None)


def _small_list(key: str, value: Any) -> Any:
    """Return a list of sizes with each of them cut."""
    size = _size(key.removesuffix("_per_layer"))
    if not isinstance(value, list | tuple) or size is None or not all(type(item) is int for item in value):
        return value
    return [min(item, size) for item in value]


def _token(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return sorted({_token(key, item) for item in value})
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return next((token for word, token in TOKENS.items() if key.startswith(word)), OTHER_TOKEN)


def _small_rope(parameters: dict[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters whose thresholds are reached, and whose factors are one for each frequency."""
    if any(isinstance(group, dict) for group in parameters.values()):
        return {kind: _small_rope(group, table) if isinstance(group, dict) else group for kind, group in parameters.items()}
    small = dict(parameters)
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = ROPE_TRAINED
    frequencies = rotary_size(table, parameters) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(small.get(name), list):
            small[name] = small[name][:frequencies]
    return small


def rotary_size(table: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """Return how many elements of a shrunken head turn."""
    head = HEAD_DIM if table.get("head_dim") else HIDDEN // HEADS
    return int(head * parameters.get("partial_rotary_factor", 1.0))


def _thinned(table: dict[str, Any]) -> dict[str, Any]:
    """Return the table with its layers cut to the first of each kind, at least two, and every list of layers with them."""
    counts = {key: value for key, value in table.items() if LAYER_COUNTS.fullmatch(key) and type(value) is int}
    if not counts:
        return table
    layers = max(counts.values())
    kept = kinds_of_layers(table, layers)
    thin: dict[str, Any] = {}
    for key, value in table.items():
        if key in counts:
            thin[key] = len(kept) if value == layers else min(value, 2)
        elif _layer_numbers(key, value, layers):
            thin[key] = [kept.index(index) for index in value if index in kept]
        elif _per_layer(value, layers):
            thin[key] = [value[index] for index in kept]
        elif _by_layer(value, layers):
            thin[key] = _renumbered(value, kept)
        elif key in PREFIXES and type(value) is int:
            thin[key] = sum(index < value for index in kept)
        elif key in SUFFIXES and type(value) is int:
            thin[key] = sum(index >= layers - value for index in kept)
        else:
            thin[key] = value
    return thin


def kinds_of_layers(table: Mapping[str, Any], layers: int) -> list[int]:
    """Return the first layer of each kind, in order, and the next one where there is but one kind.

    A layer's kind is what every per-layer list of the config says of it, and on which side of a border it lies.
    """
    signatures = [tuple(_signature(table, layers, index)) for index in range(layers)]
    kept = sorted({signature: index for index, signature in reversed(list(enumerate(signatures)))}.values())
    return kept if len(kept) > 1 or layers < 2 else [kept[0], kept[0] + 1]


def _signature(table: Mapping[str, Any], layers: int, index: int) -> Iterator[str]:
    for key, value in table.items():
        if _layer_numbers(key, value, layers):
            yield str(index in value)
        elif _per_layer(value, layers):
            yield repr(value[index])
        elif _by_layer(value, layers):
            yield repr({int(name): own for name, own in value.items()}.get(index))
        elif key in PREFIXES and type(value) is int:
            yield str(index < value)
        elif key in SUFFIXES and type(value) is int:
            yield str(index >= layers - value)


def _per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == layers and layers > 1


def _by_layer(value: Any, layers: int) -> bool:
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() and int(key) < layers for key in value)


def _layer_numbers(key: str, value: Any, layers: int) -> bool:
    named = re.search(r"layer|idx|indices|attn_", key) is not None and isinstance(value, list) and bool(value)
    return named and all(type(item) is int and item < layers for item in value) and len(set(value)) == len(value)


def _renumbered(value: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    by_layer = {int(name): small_fields(own) if isinstance(own, dict) else own for name, own in value.items()}
    return {str(new): by_layer[old] for new, old in enumerate(kept) if old in by_layer}
