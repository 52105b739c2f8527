"""The config.json of each model that has a recipe, cut to a size that converts in seconds; what is no size is as released.

What is kept is what decides the graph: the key names of the release, tied embeddings, the kind of rotary position and its scaling, the
order of sliding and full layers, fewer key-value heads than heads, normalization, activation, special tokens of several ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calque.recipe import Recipe

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "use_cache": True, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": 211, "num_hidden_layers": 2,
}  # fmt: skip

SMOLLM2 = {
    **LLAMA, "hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rope_theta": 100000, "rope_interleaved": False, "rope_scaling": None, "is_llama_config": True,
    "initializer_range": 0.041666666666666664, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip

# The factor is 32 as released; what the frequencies were trained on is 64 tokens, so that some of them are scaled here too.
LLAMA_3_2 = {
    **LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 2048, "rope_theta": 500000.0, "bos_token_id": 200, "eos_token_id": [201, 208, 209],
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
                     "rope_type": "llama3"},
}  # fmt: skip

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 40960, "max_window_layers": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 211, "bos_token_id": 200, "eos_token_id": 202,
}  # fmt: skip

# One turn of the pattern: five layers that slide, with rotary frequencies of their own, and one that sees everything.
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_size": 48, "intermediate_size": 96,
    "head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 6, "query_pre_attn_scalar": 24,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"], "_sliding_window_pattern": 6, "sliding_window": 8,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None,
    "rms_norm_eps": 1e-06, "use_bidirectional_attention": False, "use_cache": True, "torch_dtype": "bfloat16", "vocab_size": 211,
    "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0,
}  # fmt: skip

# Three quarters of a head rotate, at frequencies that are others past 32 tokens, 4096 as released. The longest length is such that the
# gain of attention, √(1 + ln(longest / 32) / ln 32), is the 1.19 of the release: a larger one would sharpen attention and its rounding.
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "embd_pdrop": 0.0, "resid_pdrop": 0.0, "full_attn_mod": 1, "lm_head_bias": False, "mlp_bias": False, "interpolate_factor": 1,
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 136, "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.2, 1.7, 3.2, 9.5, 31.0]},
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 211, "bos_token_id": 199, "eos_token_id": 199, "pad_token_id": 199,
}  # fmt: skip

BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1,
    "classifier_dropout": None, "gradient_checkpointing": False, "hidden_act": "gelu", "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2, "use_cache": True, "vocab_size": 211,
}  # fmt: skip

VIT = {
    "architectures": ["ViTForImageClassification"], "model_type": "vit", "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    "hidden_act": "gelu", "hidden_size": 48, "image_size": 28, "initializer_range": 0.02, "intermediate_size": 96, "layer_norm_eps": 1e-12,
    "num_attention_heads": 4, "num_channels": 3, "num_hidden_layers": 2, "patch_size": 7, "qkv_bias": True,
    "id2label": {"0": "tench", "1": "goldfish", "2": "great white shark"},
    "label2id": {"tench": 0, "goldfish": 1, "great white shark": 2},
}  # fmt: skip
VIT_PREPROCESSOR = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor", "resample": 2, "rescale_factor": 0.00392156862745098, "size": {"height": 28, "width": 28},
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "sentence-transformers/all-MiniLM-L6-v2": BERT,
    "BAAI/bge-small-en-v1.5": {**BERT, "torch_dtype": "float32", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_3_2,
    "Qwen/Qwen3-0.6B": QWEN3,
    "google/gemma-3-270m-it": GEMMA_3,
    "microsoft/Phi-4-mini-instruct": PHI_4_MINI,
    "google/vit-base-patch16-224": VIT,
}

# How sentence-transformers pools each of them: the mean over tokens, or the first token.
POOLING = {
    "sentence-transformers/all-MiniLM-L6-v2": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
    "BAAI/bge-small-en-v1.5": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def read_shrunken(path: Path, folder: Path) -> Recipe:
    """The recipe in the file, its model replaced by the shrunken one in ``folder`` with random weights; all else as it is."""
    model = Recipe.read(path).model
    if model.startswith("builtin:"):
        return Recipe.read(path)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
    if CONFIGS[model] is VIT:
        (folder / "preprocessor_config.json").write_text(json.dumps(VIT_PREPROCESSOR))
    if model in POOLING:
        (folder / "modules.json").write_text(json.dumps(MODULES))
        (folder / "1_Pooling").mkdir()
        table = {"word_embedding_dimension": 48, "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({**table, **POOLING[model]}))
    return Recipe.read(path, {"model": str(folder), "random_weights": True})
