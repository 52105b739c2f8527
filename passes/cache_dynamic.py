"""Settles every key and value state as an input that grows: past in, past and new out.

::

    before  %past = placeholder            [B, H, P, D], abstract
            %all  = calque.cache_update(%past, %new, "3.key")
            return logits
    after   past_key_values.3.key          input   [batch_size, H, past_sequence_length, D]
            %all  = aten.cat([%past, %new], 2)
            present.3.key = %all           output  [batch_size, H, total_sequence_length, D]
            return logits, present.0.key, present.0.value, …

Lengths taken from a placeholder's shape stay what they are: the input's own length. Masks need no change: slots are
numbered from 0 and the mask covers past and new. Source: the I/O names of optimum-onnx's decoder models@0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from calque.artifact import TensorSpec
from calque.passes import Rewrites
from calque.traced import user_nodes

if TYPE_CHECKING:
    from calque.traced import TracedModel


@dataclass(frozen=True)
class CacheDynamic:
    """Past keys and values come in, the grown ones go out; the caller carries them."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per state; none on a model whose states are settled."""
        if model.settled:
            return Rewrites(0)
        updates = {node.args[2]: node for node in user_nodes(model.graph.nodes, torch.ops.calque.cache_update.default)}
        for state in model.states:
            update = updates[state.name]
            with model.graph.inserting_before(update):
                whole = model.graph.call_function(torch.ops.aten.cat.default, ([update.args[0], update.args[1]], state.grow_axis))
            whole.meta = dict(update.meta)
            update.replace_all_uses_with(whole)
            model.graph.erase_node(update)
            shape = tuple("total_sequence_length" if size == "past_sequence_length" else size for size in state.shape)
            model.add_output(whole, TensorSpec(state.output, state.dtype, shape))
        model.settled = True
        return Rewrites(len(model.states))
