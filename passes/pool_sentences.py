"""Adds one vector a row, the pooled token embeddings, so that the graph itself gives sentence embeddings.

::

    before  last_hidden_state [B, S, H], …
    after   token_embeddings [B, S, H]
            sentence_embedding [B, H] = Σ_s w[b, s] · token_embeddings[b, s], or their maximum; divided by its length if normalize

The weights w are 0 at padding, wherever that lies: each row gets what it gets alone. Source: the modules Pooling and
Normalize of sentence-transformers 5, whose names of modes these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch.fx import Graph, Node

from calque.artifact import TensorSpec
from calque.errors import Unsupported
from calque.passes import Rewrites
from calque.traced import call

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.traced import TracedModel

aten = torch.ops.aten

HIDDEN, TOKENS, SENTENCE = "last_hidden_state", "token_embeddings", "sentence_embedding"
# Below these a row's own values would be divided by zero.
FEWEST_TOKENS, SHORTEST = 1e-9, 1e-12

Pooling = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]


@dataclass(frozen=True)
class PoolSentences:
    """``pooling``: what one vector is made of; ``normalize``: whether it is divided by its Euclidean length."""

    pooling: Pooling = "mean"
    normalize: bool = True

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite; none where the graph gives sentence embeddings already.

        Raises:
            Unsupported: the model gives no last hidden state to pool.
        """
        if model.outputs[-1].name == SENTENCE:
            return Rewrites(0)
        if model.outputs[0].name != HIDDEN:
            found = ", ".join(spec.name for spec in model.outputs)
            raise Unsupported(
                f"pool_sentences needs the output {HIDDEN}; the graph gives {found}", fix="convert with task: sentence-similarity"
            )
        graph, returned = model.graph, model.output_node().args[0]
        hidden: Node = returned[0]  # type: ignore[index, assignment]
        mask = model.placeholders()["attention_mask"]
        with graph.inserting_before(model.output_node()):
            sentence = self._pooled(graph, hidden, mask)
            if self.normalize:
                length = call(
                    graph, aten.sqrt.default, call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, sentence, sentence), [1], True)
                )
                sentence = call(graph, aten.div.Tensor, sentence, call(graph, aten.clamp.default, length, SHORTEST))
        model.keep_outputs([0])
        batch, _, size = model.outputs[0].shape
        model.outputs = (replace(model.outputs[0], name=TOKENS),)
        model.add_output(sentence, TensorSpec(SENTENCE, model.outputs[0].dtype, (batch, size)))
        return Rewrites(1)

    def _pooled(self, graph: Graph, hidden: Node, mask: Node) -> Node:
        seen = call(graph, aten.unsqueeze.default, mask, 2)  # [B, S, 1]
        if self.pooling == "max":
            padding = call(graph, aten.eq.Scalar, seen, 0)
            return call(
                graph, aten.amax.default, call(graph, aten.masked_fill.Scalar, hidden, padding, torch.finfo(torch.float32).min), [1]
            )
        weights = self._weights(graph, seen)
        weights = call(graph, aten._to_copy.default, weights, dtype=hidden.meta["val"].dtype)
        total = call(graph, aten.clamp.default, call(graph, aten.sum.dim_IntList, weights, [1], True), FEWEST_TOKENS)
        if self.pooling == "mean_sqrt_len_tokens":
            total = call(graph, aten.sqrt.default, total)
        summed = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, hidden, weights), [1])
        return call(graph, aten.div.Tensor, summed, call(graph, aten.squeeze.dim, total, 2))

    def _weights(self, graph: Graph, seen: Node) -> Node:
        """Return each token's weight before the division by their sum, int64 or bool [B, S, 1]."""
        if self.pooling in ("mean", "mean_sqrt_len_tokens"):
            return seen
        place = call(graph, aten.mul.Tensor, call(graph, aten.cumsum.default, seen, 1), seen)  # 1, 2, … ; 0 at padding
        if self.pooling == "weightedmean":
            return place
        if self.pooling == "cls":
            return call(graph, aten.eq.Scalar, place, 1)
        return call(graph, aten.eq.Tensor, place, call(graph, aten.clamp.default, call(graph, aten.sum.dim_IntList, seen, [1], True), 1))

    def expected(self, eager: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Return what the pass makes of the untouched model's outputs for one row alone, computed in float64."""
        hidden = eager[HIDDEN].astype(np.float64)  # [S, H]
        count = len(hidden)
        ways: dict[str, Callable[[], NDArray[np.float64]]] = {
            "cls": lambda: hidden[0],
            "lasttoken": lambda: hidden[-1],
            "max": lambda: hidden.max(axis=0),
            "mean": lambda: hidden.mean(axis=0),
            "mean_sqrt_len_tokens": lambda: hidden.sum(axis=0) / np.sqrt(count),
            "weightedmean": lambda: np.average(hidden, axis=0, weights=np.arange(1, count + 1)),
        }
        sentence = ways[self.pooling]()
        if self.normalize:
            sentence = sentence / np.linalg.norm(sentence)
        return {TOKENS: eager[HIDDEN], SENTENCE: sentence.astype(np.float32)}
