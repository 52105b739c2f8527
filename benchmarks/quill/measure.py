"""Held-out perplexity of the model and of the two count models it has to beat, over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.quill.vocabulary import BEGIN, CONTEXT, VOCABULARY, Tokens

IGNORED = -100
Counts = npt.NDArray[np.float64]


def pieces(documents: Sequence[Tokens]) -> Iterator[Tokens]:
    """Yield what is predicted at a time: at most a context's worth of one document, less its begin mark."""
    for document in documents:
        body = document[1:] if document[0] == BEGIN else document
        for start in range(0, len(body), CONTEXT - 1):
            yield body[start : start + CONTEXT - 1]


def perplexity(network: LlamaForCausalLM, documents: Sequence[Tokens], batch: int = 8) -> float:
    """Return the perplexity of the network; every piece follows a begin mark and nothing else."""
    listed = sorted(pieces(documents), key=len)
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(listed), batch):
            rows = listed[start : start + batch]
            width = max(map(len, rows))
            inputs = torch.full((len(rows), width), BEGIN)
            targets = torch.full((len(rows), width), IGNORED)
            for at, row in enumerate(rows):
                tokens = torch.from_numpy(row.astype(np.int64))
                inputs[at, 1 : len(row)] = tokens[:-1]
                targets[at, : len(row)] = tokens
            logits = network(input_ids=inputs, use_cache=False).logits.float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += sum(map(len, rows))
    return math.exp(total / count)


class CountModels:
    """Unigram and bigram models counted on the training tokens."""

    def __init__(self, documents: Sequence[Tokens]) -> None:
        """Count every token and every pair inside a document."""
        pairs = np.zeros(VOCABULARY * VOCABULARY, dtype=np.int64)
        for start in range(0, len(documents), 2000):
            keys = [one[:-1].astype(np.int64) * VOCABULARY + one[1:] for one in documents[start : start + 2000]]
            pairs += np.bincount(np.concatenate(keys), minlength=VOCABULARY * VOCABULARY)
        self.pairs: Counts = pairs.reshape(VOCABULARY, VOCABULARY).astype(np.float64)
        singles = self.pairs.sum(axis=0) + 1.0
        self.single: Counts = singles / singles.sum()
        self.after: Counts = self.pairs.sum(axis=1)
        self.kinds: Counts = (self.pairs > 0).sum(axis=1).astype(np.float64)

    def perplexities(self, documents: Sequence[Tokens]) -> tuple[float, float]:
        """Return the perplexity of the add-one unigram and of the Witten-Bell bigram model."""
        first = np.concatenate([one[:-1] for one in documents]).astype(np.int64)
        second = np.concatenate([one[1:] for one in documents]).astype(np.int64)
        alone = self.single[second]
        kinds = np.maximum(self.kinds[first], 1.0)
        paired = (self.pairs[first, second] + kinds * alone) / (self.after[first] + kinds)
        return float(np.exp(-np.log(alone).mean())), float(np.exp(-np.log(paired).mean()))
