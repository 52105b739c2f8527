"""Faults of positions, masks and attention: each an edit of the settled graph that a converter bug could have made."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calque import ops
from calque.traced import TracedModel, user_nodes
from tests.mutations.graph_edits import above, aten, attentions, caches, feed, joined, masks, node_of, rebuilt, replace_by

# A window that no layer has, shorter than the longest prompt.
INVENTED_WINDOW = 16


def rope_off_by_one(model: TracedModel) -> None:
    """Queries of layer 0 turn by one position more, keys do not: a turn common to both would change nothing."""
    positions, first = model.placeholders()["position_ids"], attentions(model)[0]
    with model.graph.inserting_before(next(node for node in model.graph.nodes if node.op != "placeholder")):
        shifted = model.graph.call_function(aten.add.Tensor, (positions, 1))
    query = rebuilt(model, node_of(first.args[0]), first, {positions: shifted})
    first.args = (query, *first.args[1:])


def learned_position_off_by_one(model: TracedModel) -> None:
    """Every row of the position table is read one too far."""
    positions = model.placeholders()["position_ids"]
    replace_by(model, positions, aten.add.Tensor, positions, 1)


def rope_base(model: TracedModel) -> None:
    """Frequencies are those of base 20000 instead of 10000."""
    tables = [name for name in (*model.program.constants, *model.program.state_dict) if name.endswith("inv_freq")]
    for name in tables:
        holder = model.program.constants if name in model.program.constants else model.program.state_dict
        holder[name] = holder[name] ** (math.log(20000) / math.log(10000))
    assert tables


def rope_reversed(model: TracedModel) -> None:
    """Queries and keys turn the other way round."""
    for sine in user_nodes(list(model.graph.nodes), aten.sin.default):
        replace_by(model, sine, aten.neg.default, sine)


def rotated_neighbours(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)


def rope_interleaved(model: TracedModel) -> None:
    """Neighbouring elements turn together, as in GPT-J, instead of the two halves."""
    for node in user_nodes(list(model.graph.nodes), aten.cat.default):
        first, second = joined(node)
        if first is second:
            replace_by(model, node, torch.repeat_interleave, first, 2, -1)
        elif first.target is aten.neg.default:
            replace_by(model, node, rotated_neighbours, second.args[0])


def step_before(positions: Tensor, past: Tensor) -> Tensor:
    return (positions - int(past.shape[2] > 0)).clamp_min(0)


def stale_position(model: TracedModel) -> None:
    """Once there is a cache, positions are those of the step before."""
    inputs = model.placeholders()
    replace_by(model, inputs["position_ids"], step_before, inputs["position_ids"], inputs["past_key_values.0.key"])


def slot_numbers(positions: Tensor, past: Tensor) -> Tensor:
    return (torch.arange(positions.shape[1]) + past.shape[2]).expand(positions.shape)


def position_by_slot(model: TracedModel) -> None:
    """Positions count cache slots, padding included."""
    inputs = model.placeholders()
    replace_by(model, inputs["position_ids"], slot_numbers, inputs["position_ids"], inputs["past_key_values.0.key"])


def mask_transposed(model: TracedModel) -> None:
    """A key sees its queries: what comes later is visible, what came before is not."""
    for node in user_nodes(list(model.graph.nodes), aten.le.Tensor):
        node.target = aten.ge.Tensor


def causality_one_too_wide(model: TracedModel) -> None:
    """Every query sees one token of the future."""
    for node in user_nodes(list(model.graph.nodes), aten.le.Tensor):
        feed(model, node, 1, aten.add.Tensor, 1)


def causality_dropped(model: TracedModel) -> None:
    """Every query sees the whole prompt."""
    for node in user_nodes(list(model.graph.nodes), aten.le.Tensor):
        replace_by(model, node, torch.ones_like, node)


def seen_but_own(seen: Tensor, own: Tensor) -> Tensor:
    return seen & ~own


def own_slot_hidden(model: TracedModel) -> None:
    """Causal comparison strict: no query sees its own key."""
    for mask in masks(model):
        full = node_of(mask.args[0])
        replace_by(model, full, seen_but_own, *full.args)


def padding_ignored(model: TracedModel) -> None:
    """Masks are built as if no slot were padding."""
    mask = model.placeholders()["attention_mask"]
    replace_by(model, mask, torch.ones_like, mask)


def packed_to_the_left(mask: Tensor) -> Tensor:
    return (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)).to(mask.dtype)


def padding_taken_as_right(model: TracedModel) -> None:
    """Rows are known by their number of tokens alone, as if these filled the first slots."""
    mask = model.placeholders()["attention_mask"]
    replace_by(model, mask, packed_to_the_left, mask)


def mask_without_past(model: TracedModel) -> None:
    """Queries are numbered from 0 in the mask, whatever the cache holds."""
    for mask in masks(model):
        [picked] = above(mask, aten.index_select.default)
        slots = node_of(picked.args[2])
        slots.replace_all_uses_with(node_of(slots.args[0]))


def attention_with_mask_added(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sinks: Tensor | None, causal: bool
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) * scale + mask, -1) @ v


def mask_added_as_a_number(model: TracedModel) -> None:
    """True and false are added to the scores of layer 1 as 1 and 0."""
    attentions(model)[1].target = attention_with_mask_added


def window_off_by_one(model: TracedModel) -> None:
    """The window is one token wider."""
    for node in user_nodes(list(model.graph.nodes), aten.lt.Scalar):
        node.args = (node.args[0], int(node.args[1]) + 1)  # type: ignore[arg-type]


def window_ignored(model: TracedModel) -> None:
    """Sliding layers see everything."""
    for node in user_nodes(list(model.graph.nodes), aten.lt.Scalar):
        replace_by(model, node, torch.ones_like, node)


def near_enough(seen: Tensor, key: Tensor, query: Tensor) -> Tensor:
    return seen & (query - key < INVENTED_WINDOW)


def window_invented(model: TracedModel) -> None:
    """Layers that see everything get a window."""
    for mask in masks(model):
        if mask.args[2] == "causal":
            [seen] = above(mask, aten.le.Tensor)
            replace_by(model, seen, near_enough, seen, *seen.args)


def masks_exchanged(model: TracedModel) -> None:
    """Sliding layers get the mask of full ones and the reverse."""
    one, other = masks(model)
    for layer in attentions(model):
        layer.args = (*layer.args[:3], other if layer.args[3] is one else one, *layer.args[4:])


def keys_and_values_swapped(model: TracedModel) -> None:
    """Layer 1 looks keys up among the values."""
    layer = attentions(model)[1]
    layer.args = (layer.args[0], layer.args[2], layer.args[1], *layer.args[3:])


def tiled(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat(1, query.shape[1] // x.shape[1], 1, 1)


def kv_heads_tiled(model: TracedModel) -> None:
    """Query head h of layer 1 reads key head h mod Hkv: repeated as 0 1 0 1, not 0 0 1 1."""
    layer = attentions(model)[1]
    for index in (1, 2):
        feed(model, layer, index, tiled, layer.args[0])


def kv_heads_shifted(model: TracedModel) -> None:
    """Every query head of layer 1 reads the key and value head beside its own."""
    for index in (1, 2):
        feed(model, attentions(model)[1], index, torch.roll, 1, 1)


def swapped_pair(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:2], x[:, 0:1], x[:, 2:]], dim=1)


def query_heads_swapped(model: TracedModel) -> None:
    """Query heads 0 and 1 of layer 1, which share a key head, answer for each other."""
    feed(model, attentions(model)[1], 0, swapped_pair)


def scale_missing(model: TracedModel) -> None:
    """Scores of layer 1 are not scaled."""
    layer = attentions(model)[1]
    layer.args = (*layer.args[:4], 1.0, *layer.args[5:])


def scale_of_head_size(model: TracedModel) -> None:
    """Scores of layer 1 are scaled by the head size, not by what the config says."""
    layer = attentions(model)[1]
    layer.args = (*layer.args[:4], caches(model, 1)[0].meta["val"].shape[3] ** -0.5, *layer.args[5:])


def softcap_dropped_or_invented(model: TracedModel) -> None:
    """Layer 1 loses its soft cap or, having none, gets gemma2's 50."""
    layer = attentions(model)[1]
    layer.args = (*layer.args[:5], 0.0 if layer.args[5] else 50.0, *layer.args[6:])


def attention_with_a_sink(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, causal: bool
) -> Tensor:
    return ops.decompose_attention(q, k, v, mask, scale, softcap, torch.zeros(q.shape[1]), causal)


def sink_invented(model: TracedModel) -> None:
    """The softmax of layer 1 has one more score, 0, that takes weight and gives nothing."""
    attentions(model)[1].target = attention_with_a_sink


def long_frequencies(model: TracedModel) -> None:
    """Longrope takes the long frequencies at any length."""
    _choose(model, torch.ones_like)


def short_frequencies(model: TracedModel) -> None:
    """Longrope takes the short frequencies at any length."""
    _choose(model, torch.zeros_like)


def any_row(is_long: Tensor) -> Tensor:
    return is_long.any(0, keepdim=True).expand(is_long.shape)


def frequencies_of_longest_row(model: TracedModel) -> None:
    """Longrope chooses by the longest row of the batch, as upstream's own code does."""
    _choose(model, any_row)


def frequencies_of_each_token(model: TracedModel) -> None:
    """Longrope chooses by each token's position, not by its row's last."""
    for longest in user_nodes(list(model.graph.nodes), aten.amax.default):
        longest.replace_all_uses_with(node_of(longest.args[0]))


def _choose(model: TracedModel, choice: Callable[[Tensor], Tensor]) -> None:
    for is_long in user_nodes(list(model.graph.nodes), aten.gt.Scalar):
        replace_by(model, is_long, choice, is_long)
