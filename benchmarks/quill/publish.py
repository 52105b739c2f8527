"""The published folder: weights, tokenizer, model card, record of the training and held-out text.

``python -m benchmarks.quill.publish --work DIR --out calque/models/quill`` publishes the last checkpoint of a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.quill.card import card
from benchmarks.quill.dataset import Data, prepare
from benchmarks.quill.measure import CountModels, perplexity
from benchmarks.quill.network import fresh
from benchmarks.quill.sources import LIBRARY_LICENCE, QUOTABLE, SOURCES
from benchmarks.quill.vocabulary import BEGIN, END, PAD, TURN_END, Tokens, save

PROMPTS = (
    "Return a new array with",
    "Raise an exception if the",
    "The default value is",
    "This function computes the",
    "If the file does not exist,",
)
QUESTIONS = ("What does str.join do?", "What is collections.OrderedDict?", "Explain os.remove in one sentence.")


def publish(weights: dict[str, torch.Tensor], data: Data, record: dict[str, Any], out: Path) -> None:
    """Write the folder file by file, each replaced whole, after measuring the weights as they are published."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quill-") as name:
        folder = Path(name)
        _write_model(weights, folder)
        save(data.tokenizer, folder)
        (folder / "heldout.txt").write_text(data.quoted, encoding="utf-8")
        shutil.copy(Path(__file__).with_name("LICENSE.weights"), folder / "LICENSE")
        full = record | measured(folder, data) | {"samples": samples(folder), "packages": packages()}
        (folder / "training.json").write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(full), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            path.replace(out / path.name)


def measured(folder: Path, data: Data) -> dict[str, Any]:
    """Return sizes and perplexities of a written folder, the count models' over the same tokens beside them."""
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    counted = CountModels(data.train)
    quoted = np.array(data.tokenizer.encode(data.quoted).ids, dtype=np.uint16)
    figures: dict[str, dict[str, float]] = {}
    texts: dict[str, Sequence[Tokens]] = {
        "held_out": data.held_out,
        "held_out_chat": data.held_out_chat,
        "heldout_txt": [quoted],
    }
    for name, documents in texts.items():
        unigram, bigram = counted.perplexities(documents)
        figures[name] = {
            "tokens": sum(len(one) - 1 for one in documents),
            "perplexity": round(perplexity(network, documents), 3),
            "unigram_perplexity": round(unigram, 1),
            "bigram_perplexity": round(bigram, 1),
        }
    return {
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "corpus": data.corpus.figures() | {"train_tokens": sum(map(len, data.train))},
        "perplexity": figures,
    }


def samples(folder: Path) -> list[dict[str, str]]:
    """Return greedy continuations and chat answers of a written folder."""
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[dict[str, str]] = []
    for text in (*PROMPTS, *QUESTIONS):
        if text in QUESTIONS:
            turns = [{"role": "user", "content": text}]
            text_given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            given = tokenizer(text_given, add_special_tokens=False, return_tensors="pt")
        else:
            given = tokenizer(text, return_tensors="pt")
        made = network.generate(**given, max_new_tokens=40, do_sample=False)[0, given["input_ids"].shape[1] :]
        kind = "answer" if text in QUESTIONS else "continuation"
        found.append({"prompt": text, "kind": kind, "text": str(tokenizer.decode(made, skip_special_tokens=True))})
    return found


def packages() -> list[dict[str, object]]:
    """Return every source of the corpus with version, licence and whether heldout.txt may quote it."""
    listed = [("python", platform.python_version(), LIBRARY_LICENCE)]
    listed += [(source.name, source.version, source.licence) for source in SOURCES]
    return [{"name": name, "version": at, "licence": terms, "quoted": name in QUOTABLE} for name, at, terms in listed]


def software() -> dict[str, str]:
    """Return the versions that a repetition needs for the same numbers."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "safetensors")
    }


def _write_model(weights: dict[str, torch.Tensor], folder: Path) -> None:
    network = fresh(0)
    # The output layer shares the embedding's tensor, so it has no name of its own among the weights.
    missing, unknown = network.load_state_dict(weights, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"the weights do not fit the network: missing {missing}, unknown {unknown}")
    network.generation_config = GenerationConfig.from_dict(
        {
            "bos_token_id": BEGIN,
            "eos_token_id": [END, TURN_END],
            "pad_token_id": PAD,
            "do_sample": False,
            "max_new_tokens": 128,
        }
    )
    nn.Module.to(network, torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Publish the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="work folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder the model is written to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stored = torch.load(given.work / "checkpoint.pt", weights_only=True)
    record = json.loads((given.work / "record.json").read_text(encoding="utf-8"))
    publish(stored["weights"], prepare(given.work), record, given.out)


if __name__ == "__main__":
    main()
