"""Tiny checkpoints in the formats that models are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from calque import pickled
from calque.random_weights import write_random_weights

HELD_OUT = Path(__file__).parents[1] / "calque" / "models" / "quill" / "heldout.txt"


def llama_config(**changes: Any) -> Any:
    """Return the config of a llama with one layer."""
    shape: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return CONFIG_MAPPING["llama"](**shape | {"num_key_value_heads": 1, "pad_token_id": 0, "architectures": ["LlamaForCausalLM"]} | changes)


def write_llama(folder: Path, **changes: Any) -> Path:
    """``folder`` holds a llama of random weights, as safetensors; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(**changes)
    config.save_pretrained(folder)
    write_random_weights(config, folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return copies of the tensors of ``folder/model.safetensors``."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def as_pickle(folder: Path, shards: int = 1) -> None:
    """The weights of ``folder`` lie in pytorch_model.bin, or in several with an index, and no longer in safetensors."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / pickled.SINGLE)
        return
    names = sorted(tensors)
    files = {f"pytorch_model-{number + 1:05}-of-{shards:05}.bin": names[number::shards] for number in range(shards)}
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    table = {name: file for file, held in files.items() for name in held}
    (folder / pickled.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def write_sentencepiece(path: Path, **options: Any) -> None:
    """``path`` holds a sentencepiece model of 400 pieces with bytes to fall back on, as llama's first ones have."""
    from sentencepiece import SentencePieceTrainer

    llama: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    settings: dict[str, Any] = {"vocab_size": 400, "num_threads": 1, "minloglevel": 2} | llama | options
    SentencePieceTrainer.train(input=str(HELD_OUT), model_prefix=str(path.with_suffix("")), **settings)
    path.with_suffix(".vocab").unlink()
