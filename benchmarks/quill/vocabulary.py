"""The tokenizer: a byte-level BPE learnt from the training side of the corpus, with a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.quill.corpus import Exchange

VOCABULARY = 4096
SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BEGIN, END = 0, 1, 2
TURN_END = SPECIAL.index("<|end|>")
CONTEXT = 1024
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""

Tokens = npt.NDArray[np.uint16]


def learn(texts: Sequence[str], every: int) -> Tokenizer:
    """Return a tokenizer learnt from every n-th text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::every], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Return each text as tokens between its begin and end marks."""
    found = []
    for start in range(0, len(texts), 256):
        for item in tokenizer.encode_batch(list(texts[start : start + 256]), add_special_tokens=False):
            found.append(np.array([BEGIN, *item.ids, END], dtype=np.uint16))
    return found


def chat_text(exchange: Exchange) -> str:
    """Return an exchange as the chat template renders it, less the begin mark that encoding adds."""
    return f"<|user|>{exchange.question}<|end|><|assistant|>{exchange.answer}<|end|>"


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer, its settings and the chat template as Hugging Face files."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": list(SPECIAL[3:]),
        "padding_side": "left",
        "truncation_side": "left",
        "model_max_length": CONTEXT,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
