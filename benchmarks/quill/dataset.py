"""Tokens of the corpus and the batches cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.quill.corpus import Corpus, build
from benchmarks.quill.vocabulary import Tokens, chat_text, encode, learn

CHAT_SHARE = 0.5
TOKENIZER_SAMPLE = 4
QUOTE_BREAK = "\n\n\n"


@dataclass
class Data:
    """Everything the training and the measurement read."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: list[Tokens]
    held_out: list[Tokens]
    held_out_chat: list[Tokens]

    @property
    def quoted(self) -> str:
        """The held-out text that is published with the weights."""
        return QUOTE_BREAK.join(self.corpus.quoted) + "\n"


def prepare(work: Path) -> Data:
    """Return corpus and tokens, reading from the work folder what an earlier call left there."""
    corpus = build(work)
    stored = work / "tokenizer.json"
    if stored.exists():
        tokenizer = Tokenizer.from_file(str(stored))
    else:
        tokenizer = learn(corpus.train, TOKENIZER_SAMPLE)
        tokenizer.save(str(stored))
    chosen = corpus.exchanges[: int(CHAT_SHARE * len(corpus.exchanges))]
    return Data(
        corpus,
        tokenizer,
        train=encode(tokenizer, corpus.train) + encode(tokenizer, [chat_text(item) for item in chosen]),
        held_out=encode(tokenizer, corpus.held_out),
        held_out_chat=encode(tokenizer, [chat_text(item) for item in corpus.held_out_exchanges]),
    )


def windows(documents: Sequence[Tokens], batch: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches for ever: documents shuffled and packed end to end, cut into windows, windows shuffled."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(documents))
        stream = np.concatenate([documents[at] for at in order])
        count = (len(stream) - 1) // length
        starts = random.permutation(count) * length
        for at in range(0, count - batch + 1, batch):
            rows = [stream[start : start + length + 1] for start in starts[at : at + batch]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
