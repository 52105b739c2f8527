"""Computes logits only for the positions that are asked for, by cutting the hidden states before the head.

::

    before  %h [B, S, H] -> linear(%h, head) -> … elementwise … -> logits [B, S, V]
    after   keep=last      %h[:, -1:]                                    -> logits [B, 1, V]
            keep=dynamic   calque.keep_last(%h, num_logits_to_keep)      -> logits [B, num_logits_to_keep, V]; 0 keeps all

Generation reads one position of a prompt; the head over all of them is a large share of prefill. Source: the input
``num_logits_to_keep`` of onnx-community's decoder files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch.fx import Node

from calque.artifact import NUM_LOGITS_TO_KEEP, TensorSpec
from calque.errors import Unsupported
from calque.passes import Rewrites
from calque.traced import call, refresh

if TYPE_CHECKING:
    from calque.traced import TracedModel

aten = torch.ops.aten

# What models put between the head and the logits: scales, soft caps, casts. All act on each position alone.
ELEMENTWISE = {aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten._to_copy.default, aten.add.Tensor}
HEADS = {aten.linear.default, aten.matmul.default}


@dataclass(frozen=True)
class KeepLastLogits:
    """``keep``: the last position of every row, or as many as the caller asks for."""

    keep: Literal["last", "dynamic"] = "last"

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite; none where the logits are cut already.

        Raises:
            Unsupported: what produces the logits is not a linear head.
        """
        if not model.states:
            raise Unsupported("keep_last_logits is for models that generate; this one keeps no states", fix="leave `logits` out")
        if model.outputs[0].shape[1] != "sequence_length":
            return Rewrites(0)
        chain = head_chain(model.output_node().args[0][0])  # type: ignore[index, arg-type]
        head = chain[0]
        hidden = head.args[0]
        assert isinstance(hidden, Node)
        with model.graph.inserting_before(head):
            kept = self._kept(model, hidden)
        head.replace_input_with(hidden, kept)
        for node in chain:
            refresh(node)
        length: int | str = 1 if self.keep == "last" else NUM_LOGITS_TO_KEEP
        batch, _, vocabulary = model.outputs[0].shape
        model.outputs = (replace(model.outputs[0], shape=(batch, length, vocabulary)), *model.outputs[1:])
        return Rewrites(1)

    def _kept(self, model: TracedModel, hidden: Node) -> Node:
        if self.keep == "last":
            return call(model.graph, aten.slice.Tensor, hidden, 1, -1, 2**63 - 1)
        with hidden.meta["val"].fake_mode:
            value = torch.empty((), dtype=torch.int64)
        count = model.add_input(TensorSpec(NUM_LOGITS_TO_KEEP, "int64", ()), value)
        return call(model.graph, torch.ops.calque.keep_last.default, hidden, count)


def head_chain(logits: Node) -> list[Node]:
    """Return the nodes from the head to the logits, head first.

    Raises:
        Unsupported: something on the way is not elementwise.
    """
    chain = [logits]
    while chain[0].target not in HEADS:
        node = chain[0]
        above = node.args[0] if node.args else None
        if node.target not in ELEMENTWISE or not isinstance(above, Node):
            raise Unsupported(
                "keep_last_logits finds no linear head above the logits", [f"{node.name}: {node.target}"], "convert with --logits all"
            )
        chain.insert(0, above)
    return chain
