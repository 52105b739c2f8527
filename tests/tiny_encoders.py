"""Tiny random encoders, one config a type, and a sentence encoder's folder as sentence-transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from calque.random_weights import write_random_weights
from calque.tasks import TASKS

VOCABULARY = 211
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    "type_vocab_size": 2, "num_labels": 2,
}  # fmt: skip

# What a type's config says besides the shape; None: it has no such field.
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "cls_token_id": 0, "type_vocab_size": 1},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    "albert": {"embedding_size": 32},
    "electra": {"embedding_size": 32},
    "mpnet": {"pad_token_id": 1},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
                   "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "num_hidden_layers": 3},
    "nomic_bert": {},
    "t5": {"d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8},
}  # fmt: skip


def encoder_config(model_type: str, **extra: Any) -> Any:
    return CONFIG_MAPPING[model_type](**SHAPE | ENCODERS[model_type] | extra)


def save_encoder(folder: Path, model_type: str, task: str = "feature-extraction", **extra: Any) -> Path:
    """The folder holds the config and random weights of a checkpoint whose architecture says its task."""
    config = encoder_config(model_type, **extra)
    folder.mkdir(parents=True, exist_ok=True)
    write_random_weights(config, folder, task=TASKS[task])
    config.save_pretrained(folder)
    return folder


def save_pooling(folder: Path, *kinds: str, **config: Any) -> Path:
    """The folder says which modules follow the encoder, as sentence-transformers writes it."""
    paths = {"Transformer": "", **{kind: f"{number}_{kind}" for number, kind in enumerate(kinds, 1)}}
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(paths.items())
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder
