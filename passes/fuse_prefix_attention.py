"""Joins attention over slots with a causal mask into one operator that is told a length a row instead.

::

    before  %mask = calque.attention_mask(%full, %held, "causal", 0)
            calque.attention(%q, %k, %v, %mask, scale, 0.0, None, False)
    after   %lengths = to(add(%write_indices, sym_size(%input_ids, 1)), int32)           [B]
            calque.prefix_attention(%q, %k, %v, %lengths, scale)
    left    sliding and chunked windows, bidirectional and custom masks, soft caps, sinks: they hide more than a length says

A row's tokens fill its slots from 0 (`cache_static`), so the query at slot ``p`` sees the slots up to ``p`` and no other: a prefix, whose
length with the last query is ``write_indices + S``. Of a query that is padding the mask hides more, and nothing reads what it gives.

Source: ``IAttention.key_value_lengths`` and ``CausalMaskKind.LOWER_RIGHT`` of TensorRT 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from calque.passes import Rewrites
from calque.patterns import aten, calls
from calque.traced import call, user_nodes

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque


@dataclass(frozen=True)
class FusePrefixAttention:
    """Attention whose mask is causal over slots is told how many of them a row fills."""

    after: ClassVar[frozenset[str]] = frozenset({"cache_static"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per attention, and why the others were left."""
        write = model.placeholders().get("write_indices")
        count, skipped = 0, []
        lengths: Node | None = None
        for node in user_nodes(model.graph.nodes, calque.attention.default):
            if why := "no call continues from another" if write is None else _hides_more(node):
                skipped.append((node.name, why))
                continue
            q, k, v, _, scale = node.args[:5]
            lengths = lengths or _lengths(model, write)
            with model.graph.inserting_before(node):
                fused = call(model.graph, calque.prefix_attention.default, q, k, v, lengths, scale)
            fused.meta = {**node.meta, "val": fused.meta["val"]}
            node.replace_all_uses_with(fused)
            model.graph.erase_node(node)
            count += 1
        return Rewrites(count, tuple(skipped))


def _hides_more(node: Node) -> str:
    """Return what keeps an attention from being one over a prefix; nothing where it is."""
    _, k, v, mask, _, softcap, sinks, _ = node.args
    if softcap:
        return "its scores are capped"
    if sinks is not None:
        return "it has sinks"
    if not calls(mask, calque.attention_mask.default):
        return "its mask is not one that says what it means"
    kind, window = mask.args[2:]  # type: ignore[union-attr]
    if kind != "causal":
        return f"its mask is {kind}, of {window}" if window else f"its mask is {kind}"
    if not (_slots(k) and _slots(v)):
        return "its keys are no slots of the cache"
    return ""


def _slots(node: Any) -> bool:
    return calls(node, calque.write_slots.default)


def _lengths(model: TracedModel, write: Any) -> Node:
    """Return how many slots each row fills up to the last query of a call, padding among them."""
    first = next(node for node in model.graph.nodes if node.op == "call_function")
    with model.graph.inserting_before(first):
        new = call(model.graph, aten.sym_size.int, model.placeholders()["input_ids"], 1)
        return call(model.graph, aten._to_copy.default, call(model.graph, aten.add.Tensor, write, new), dtype=torch.int32)
