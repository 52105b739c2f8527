"""The gate over a model whose cache lies in slots, and faults that such a cache can have."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from calque import passes
from calque.passes.cache_static import CacheStatic
from calque.traced import TracedModel, user_nodes
from calque.validation import scenarios
from calque.validation.reference import store_reference
from tests.mutations.graph_edits import aten, feed, node_of, outputs, replace_by, return_instead
from tests.mutations.traced_gate import TracedGate, io_of, traced_gate
from tests.tiny_models import VOCABULARY

SLOTS = 48
write_slots = torch.ops.calque.write_slots.default


@cache
def slots_gate(name: str) -> TracedGate:
    """The gate of a model whose keys and values lie in 48 slots, up to the last of them; made once a process."""
    gate = traced_gate(name)
    settled = gate.traced.copy()
    passes.run([CacheStatic(SLOTS)], settled)
    windows = {state.window for state in settled.states if state.window}
    built = scenarios.build(settled.limits, VOCABULARY, excluded=(0, 1, 2), windows=windows, in_slots=True)
    folder = Path(tempfile.mkdtemp(dir=gate.folder))
    references = store_reference(gate.source.load_eager, built, io_of(settled), folder, gate.folder / "scratch")
    return replace(gate, settled=settled, scenarios=built, references=references, folder=folder)


def _writes(change: Callable[[Node], tuple[Any, ...]], model: TracedModel) -> None:
    """Every write of layer 1 goes where ``change`` of the row's first slot says."""
    for node in user_nodes(model.graph.nodes, write_slots)[2:4]:
        target, *rest = change(node)
        feed(model, node, 2, target, *rest)


def one_slot_early(model: TracedModel) -> None:
    """Layer 1 writes over the newest token of the call before."""
    _writes(lambda _: (lambda first: (first - 1).clamp_min(0),), model)


def always_from_the_first_slot(model: TracedModel) -> None:
    """Layer 1 writes every call over the one before."""
    _writes(lambda _: (torch.zeros_like,), model)


def where_the_row_before_writes(model: TracedModel) -> None:
    """Layer 1 takes the slots of another row."""
    _writes(lambda _: (aten.roll.default, [1], [0]), model)


def where_the_longest_row_writes(model: TracedModel) -> None:
    """Layer 1 takes one place for all rows, as a cache with one length does."""
    _writes(lambda _: (lambda first: first.max().expand_as(first),), model)


def _slots_before(model: TracedModel) -> list[Node]:
    """The comparisons of slots with what a query is at."""
    return user_nodes(list(model.graph.nodes), aten.le.Tensor)


def causality_one_too_wide(model: TracedModel) -> None:
    """A query sees the slot after its own."""
    for node in _slots_before(model):
        feed(model, node, 1, aten.add.Tensor, 1)


def causality_dropped(model: TracedModel) -> None:
    """A query sees every slot that holds something after the call."""
    for node in _slots_before(model):
        replace_by(model, node, torch.ones_like, node)


def lengths_alone(model: TracedModel) -> None:
    """Every query sees all slots, written or not."""
    for node in user_nodes(list(model.graph.nodes), torch.ops.calque.attention_mask.default):
        feed(model, node, 0, torch.ones_like)


def mask_from_the_first_slot(model: TracedModel) -> None:
    """Queries are numbered from 0 in the mask, wherever they are written."""
    writes = model.placeholders()["write_indices"]
    for reader in [user for user in writes.users if user.target is aten.unsqueeze.default]:
        feed(model, reader, 0, torch.zeros_like)


def length_before_the_call(model: TracedModel) -> None:
    """The slots of a call are hidden from it, but for each query's own."""
    lengths, writes = (model.placeholders()[name] for name in ("kv_lengths", "write_indices"))
    lengths.replace_all_uses_with(writes)


def window_off_by_one(model: TracedModel) -> None:
    """The window is one slot wider."""
    for node in user_nodes(list(model.graph.nodes), aten.lt.Scalar):
        node.args = (node.args[0], int(str(node.args[1])) + 1)


def past_returned(model: TracedModel) -> None:
    """Layer 1 gives back the keys that it was given."""
    past = model.placeholders()["past_key_values.1.key"]
    return_instead(model, {"present.1.key": past})


def values_in_the_slots_of_keys(model: TracedModel) -> None:
    """Layer 1 gives back its values under the name of its keys, and the reverse."""
    found = outputs(model)
    return_instead(model, {"present.1.key": node_of(found["present.1.value"]), "present.1.value": node_of(found["present.1.key"])})


FAULTS: tuple[Callable[[TracedModel], None], ...] = (
    one_slot_early, always_from_the_first_slot, where_the_row_before_writes, where_the_longest_row_writes, causality_one_too_wide,
    causality_dropped, lengths_alone, mask_from_the_first_slot, length_before_the_call, window_off_by_one, past_returned,
    values_in_the_slots_of_keys,
)  # fmt: skip


def faults(whole: TracedModel) -> list[Callable[[TracedModel], None]]:
    """The faults that a model can have."""
    windows = any(state.window for state in whole.states)
    return [fault for fault in FAULTS if fault is not window_off_by_one or windows]


def broken(fault: Callable[[TracedModel], None], whole: TracedModel) -> TracedModel:
    """A copy of the model with the fault in it."""
    copied = whole.copy()
    fault(copied)
    copied.finish_rewrite()
    return copied
