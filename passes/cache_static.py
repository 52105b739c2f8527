"""Settles every key and value state as slots of a fixed number, written in place: nothing grows, nothing is copied.

::

    before  input_ids  attention_mask  position_ids
            %past = placeholder               [B, H, P, D], abstract
            %all  = calque.cache_update(%past, %new, "3.key")
            %mask = calque.attention_mask(%full, %key_mask, "causal", 0)
            return logits
    after   input_ids  position_ids  write_indices int64 [B]  kv_lengths int32 [B]
            past_key_values.3.key             input   [batch_size, H, max_length, D]
            %all  = calque.write_slots(%past, %new, write_indices)
            %mask = calque.attention_mask(slot <= write_indices + query and slot < kv_lengths, …, "causal", 0)
            present.3.key = %all              output  [batch_size, H, max_length, D], the memory of its input
            return logits, present.0.key, present.0.value, …

A row's tokens fill its slots from 0, so a slot is a position. ``write_indices`` says where a row's new tokens go, ``kv_lengths``
how many slots hold a token after the call: padding on the right is written past them and overwritten by what follows. The
attention mask is one of slots, made from ``kv_lengths``; lengths that the graph took from a placeholder's shape are those of
the slots, and a mask is made anew from what it means. Source: ``TensorScatter`` of ONNX opset 24.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Graph, Node

from calque.artifact import TensorSpec
from calque.errors import Unsupported
from calque.passes import Rewrites
from calque.traced import call, source_of, user_nodes

if TYPE_CHECKING:
    from sympy import Expr

    from calque.traced import TracedModel

aten = torch.ops.aten

# Where neither the recipe nor the model says how many: memory for all slots of every row is taken at once.
DEFAULT_SLOTS = 2048


@dataclass(frozen=True)
class CacheStatic:
    """Keys and values lie in ``max_length`` slots; 0 takes the recipe's, else what the model was trained for, at most 2048."""

    max_length: int = 0
    after: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse a cache that could hold nothing."""
        if self.max_length < 0:
            raise ValueError(f"max_length: {self.max_length} slots; 1 or more expected, or 0 for the model's own")

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per state; none on a model whose states are settled.

        Raises:
            Unsupported: masks or lengths that cannot be said in slots, each with its line of the model's source.
        """
        if model.settled:
            return Rewrites(0)
        slots = self._slots(model)
        _guard(model)
        places = _Slots(model, slots)
        lengths = _Lengths(model)
        _write_in_slots(model, places)
        _mask_anew(model, places)
        lengths.settle(slots)
        model.propagate(lengths.before)
        model.limits = replace(model.limits, padding="none" if model.limits.padding == "none" else "right", max_length=slots)
        model.settled = True
        return Rewrites(len(model.states))

    def _slots(self, model: TracedModel) -> int:
        told = [length for length in (self.max_length, model.limits.max_length) if length]
        return min(told) if told else min(model.trained_length or DEFAULT_SLOTS, DEFAULT_SLOTS)


def _guard(model: TracedModel) -> None:
    """Leave quietly if every mask says what it means."""
    masks = user_nodes(model.graph.nodes, torch.ops.calque.attention_mask.default)
    custom = [" ".join((mask.name, *source_of(mask))) for mask in masks if mask.args[2] == "custom"]
    if custom:
        raise Unsupported("a static cache needs masks whose meaning is known", custom, "use cache_dynamic, which takes any mask")


class _Slots:
    """The nodes that say where a call stands in its slots: ``query`` int64 [B, S], ``held`` bool [B, M]; masks by kind and window."""

    def __init__(self, model: TracedModel, slots: int) -> None:
        self.model, self.count = model, slots
        inputs = model.placeholders()
        ids = inputs["input_ids"]
        first = model.states[0].input
        batch = ids.meta["val"].shape[0]
        if "position_ids" not in inputs:
            # One convention for all: what counts positions by itself is told them too, and they show where padding lies.
            spec = TensorSpec("position_ids", "int64", ("batch_size", "sequence_length"))
            model.add_input(spec, ids.meta["val"].new_empty(ids.meta["val"].shape), first)
        self.write = model.add_input(TensorSpec("write_indices", "int64", ("batch_size",)), ids.meta["val"].new_empty(batch), first)
        lengths = ids.meta["val"].new_empty(batch, dtype=torch.int32)
        self.lengths = model.add_input(TensorSpec("kv_lengths", "int32", ("batch_size",)), lengths, first)
        self._masks: dict[tuple[str, int], Node] = {}
        self._begin = next(node for node in model.graph.nodes if node.op == "call_function")
        with model.graph.inserting_before(self._begin):
            self._place(model.graph, ids)

    def _place(self, graph: Graph, ids: Node) -> None:
        new = call(graph, aten.sym_size.int, ids, 1)
        self.query = call(graph, aten.add.Tensor, call(graph, aten.unsqueeze.default, self.write, 1), self._arange(graph, new))
        self.slot = self._arange(graph, self.count)
        wide = call(graph, aten._to_copy.default, call(graph, aten.unsqueeze.default, self.lengths, 1), dtype=torch.int64)
        self.held = call(graph, aten.lt.Tensor, self.slot, wide)
        self.key_mask = call(graph, aten._to_copy.default, self.held, dtype=torch.int64)

    def _arange(self, graph: Graph, count: Any) -> Node:
        node = graph.call_function(aten.arange.default, (count,), {"dtype": torch.int64})
        size = count.meta["val"] if isinstance(count, Node) else count
        node.meta = {"nn_module_stack": {}, "val": self.write.meta["val"].new_empty(size)}
        return node

    def mask(self, kind: str, window: int) -> Node:
        """Return which slots each query sees, bool [B, 1, S, M]: as ``calque.ops.visible``, positions being slots."""
        if (kind, window) not in self._masks:
            with self.model.graph.inserting_before(self._begin):
                self._masks[kind, window] = self._mask(self.model.graph, kind, window)
        return self._masks[kind, window]

    def _mask(self, graph: Graph, kind: str, window: int) -> Node:
        query = call(graph, aten.unsqueeze.default, call(graph, aten.unsqueeze.default, self.query, 1), 3)
        seen = call(graph, aten.unsqueeze.default, call(graph, aten.unsqueeze.default, self.held, 1), 1)
        both = aten.logical_and.default
        if kind != "bidirectional":
            seen = call(graph, both, seen, call(graph, aten.le.Tensor, self.slot, query))
        if kind == "sliding":
            seen = call(graph, both, seen, call(graph, aten.lt.Scalar, call(graph, aten.sub.Tensor, query, self.slot), window))
        if kind == "chunked":
            parts = (call(graph, aten.div.Tensor_mode, x, window, rounding_mode="floor") for x in (query, self.slot))
            seen = call(graph, both, seen, call(graph, aten.eq.Tensor, *parts))
        # Every query sees its own slot, so that the scores of a padded query stay finite.
        return call(graph, aten.logical_or.default, seen, call(graph, aten.eq.Tensor, self.slot, query))


def _write_in_slots(model: TracedModel, places: _Slots) -> None:
    """Leave states that are inputs and outputs of one shape."""
    updates = {node.args[2]: node for node in user_nodes(model.graph.nodes, torch.ops.calque.cache_update.default)}
    inputs = model.placeholders()
    settled, shapes = [], {}
    for state in model.states:
        batch, heads, _, size = state.shape
        state = replace(state, shape=(batch, heads, places.count, size), grow_axis=None, update="in_place", init="zeros")
        settled.append(state)
        shapes[state.input] = TensorSpec(state.input, state.dtype, state.shape)
        past = inputs[state.input]
        value = past.meta["val"]
        past.meta["val"] = value.new_empty((value.shape[0], value.shape[1], places.count, value.shape[3]))
        update = updates[state.name]
        with model.graph.inserting_before(update):
            whole = call(model.graph, torch.ops.calque.write_slots.default, past, update.args[1], places.write)
        update.replace_all_uses_with(whole)
        model.graph.erase_node(update)
        model.add_output(whole, TensorSpec(state.output, state.dtype, state.shape))
    model.rename_inputs(shapes)
    model.states = tuple(settled)


def _mask_anew(model: TracedModel, places: _Slots) -> None:
    """Leave no mask of the layout before: those that say what they mean are made for slots, and so is the one of the call."""
    for mask in user_nodes(model.graph.nodes, torch.ops.calque.attention_mask.default):
        _, key_mask, kind, window = mask.args
        mask.args = (places.mask(str(kind), int(str(window))), key_mask and places.held, kind, window)
    for attention in user_nodes(model.graph.nodes, torch.ops.calque.attention.default):
        if attention.args[3] is None and attention.args[7]:
            attention.update_arg(3, places.mask("causal", 0))
    given = model.placeholders().get("attention_mask")
    if given is not None:
        given.replace_all_uses_with(places.key_mask)
        model.drop_input("attention_mask")
    model.graph.eliminate_dead_code()


class _Lengths:
    """The lengths that the graph takes from shapes: what came before (P), and that with the new (P + S), which is now all slots."""

    def __init__(self, model: TracedModel) -> None:
        self.model = model
        inputs = model.placeholders()
        self.before = inputs[model.states[0].input].meta["val"].shape[2].node.expr
        self.all = self.before + inputs["input_ids"].meta["val"].shape[1].node.expr

    def settle(self, slots: int) -> None:
        """No node takes a length from the layout before.

        Raises:
            Unsupported: every use of one that has no meaning in slots.
        """
        for node, length in self._left():
            if length == self.all:
                node.replace_all_uses_with(slots)  # type: ignore[arg-type]  # torch writes any argument
        self.model.graph.eliminate_dead_code()
        wrong = [user for node, _ in self._left() for user in node.users if not isinstance(user.meta.get("val"), torch.SymInt)]
        if wrong:
            lines = [" ".join((f"{user.name} ({user.target})", *source_of(user))) for user in wrong]
            raise Unsupported("a static cache has no length before the call", lines, "use cache_dynamic, whose past has one")

    def _left(self) -> list[tuple[Node, Expr]]:
        """Return the nodes that give a length with P in it, and that length."""
        lengths = ((node, node.meta["val"]) for node in self.model.graph.nodes if node.op == "call_function")
        found = [(node, value.node.expr) for node, value in lengths if isinstance(value, torch.SymInt)]
        return [(node, length) for node, length in found if length.has(self.before)]
