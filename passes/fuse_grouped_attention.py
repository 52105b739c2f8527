"""Joins the attention of a layer with its cache and, where padding allows, with the rotation: one operator a layer.

::

    before  %q = calque.rotary(transpose(reshape(%query)), %cos, %sin)    %query [B, S, H·D]
            %k = aten.cat([%past_key, calque.rotary(…)], 2)              present.0.key = %k
            %v = aten.cat([%past_value, transpose(reshape(%value))], 2)  present.0.value = %v
            reshape(transpose(calque.attention(%q, %k, %v, %mask, …)))
    after   %out, present.0.key, present.0.value = calque.grouped_attention(
                %query, %key, %value, %past_key, %past_value, …)
    padding any           takes the mask as a bias, of padding alone where there is no window; queries and keys turned before it:
                          exact wherever padding lies
    padding right, none   takes how many tokens a row holds, and a table of angles: a row's cache has no gaps
    left    heads of several sizes or of no multiple of 8, keys shared between layers, masks that reach ahead

None takes several tokens of several rows over a cache (``limits.batched_chunk``). A table of angles is made where their
frequencies are constants, and ends at the longest text that the model was made for (``limits.max_length``).
Source: com.microsoft.GroupQueryAttention of onnxruntime@1.31.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import getitem
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.fx import Node

from calque.passes import Rewrites
from calque.patterns import aten, calls, factors, only_user, wave
from calque.traced import call, user_nodes
from calque.weights import Derived

if TYPE_CHECKING:
    from calque.traced import TracedModel

attention = torch.ops.calque.attention.default
grouped = torch.ops.calque.grouped_attention.default
rotary = torch.ops.calque.rotary.default
flat_rotary = torch.ops.calque.flat_rotary.default
rms_norm = torch.ops.calque.rms_norm.default
join_heads = torch.ops.calque.join_heads.default
# Masks that hide what comes later, as the operator does by itself.
CAUSAL = ("causal", "sliding", "chunked")


@dataclass(frozen=True)
class FuseGroupedAttention:
    """Attention, cache and rotation of a layer are one operator. ``padding``: where a row may have some."""

    padding: Literal["any", "right", "none"] = "any"

    after: ClassVar[frozenset[str]] = frozenset({"cache_dynamic", "fuse_rotary"})

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per layer; the model's limits say what the operator cannot do."""
        found: list[_Layer] = []
        skipped = []
        for node in user_nodes(model.graph.nodes, attention):
            layer = _layer(node, model.output_node(), gaps=self.padding == "any")
            if isinstance(layer, _Layer):
                found.append(layer)
            else:
                skipped.append((node.name, layer))
        if self.padding != "any" and skipped:
            # Caches without gaps beside caches with them: one mask could not tell of both.
            skipped += [(layer.attention.name, "another layer was left") for layer in found]
            found = []
        inputs = _Inputs(model)
        for layer in found:
            _join(model, layer, inputs, gaps=self.padding == "any")
        model.graph.eliminate_dead_code()
        model.drop_unused_parameters()
        if found:
            lengths = [length for length in (model.limits.max_length, inputs.longest) if length]
            model.limits = replace(model.limits, padding=self.padding, batched_chunk=False, max_length=min(lengths, default=None))
        return Rewrites(len(found), tuple(skipped))


@dataclass(frozen=True)
class _Layer:
    """One layer's attention; ``query``, ``key`` and ``value`` [B, heads, S, D] are new, ``whole_…`` what is kept."""

    attention: Node
    query: Node
    key: Node
    value: Node
    past_key: Node
    past_value: Node
    whole_key: Node
    whole_value: Node
    kind: str
    window: int

    @property
    def heads(self) -> tuple[int, int]:
        """How many heads queries have, and keys and values."""
        return int(self.query.meta["val"].shape[1]), int(self.key.meta["val"].shape[1])


def _layer(node: Any, output: Node, gaps: bool) -> _Layer | str:
    """Return the layer that an attention belongs to, or why it cannot be joined with its cache."""
    query, whole_key, whole_value, mask = node.args[:4]
    if not _grows(whole_key) or not _grows(whole_value):
        return "its keys and values are not its own cache, grown by its own tokens"
    if whole_key.users.keys() | whole_value.users.keys() != {node, output}:
        return "its keys or values are read by other layers too"
    if not calls(mask, torch.ops.calque.attention_mask.default) or mask.args[2] not in CAUSAL:
        return "its mask does not hide all that comes later"
    kind, window = mask.args[2], int(mask.args[3])
    if not gaps and kind == "chunked":
        return "its mask is cut in chunks, which is more than a window"
    (past_key, key), (past_value, value) = whole_key.args[0], whole_value.args[0]
    sizes = {int(part.meta["val"].shape[3]) for part in (query, key, value)}
    if len(sizes) > 1:
        return f"its heads have several sizes: {sorted(sizes)}"
    (size,) = sizes
    if size % 8:
        return f"its heads have {size} elements, which is no multiple of 8"
    return _Layer(node, query, key, value, past_key, past_value, whole_key, whole_value, str(kind), window if kind == "sliding" else 0)


def _grows(value: Any) -> bool:
    """Return whether a value is a past, which comes in, with new positions behind it."""
    if not calls(value, aten.cat.default) or tuple(value.args[1:]) != (2,) or len(value.args[0]) != 2:
        return False
    return bool(value.args[0][0].op == "placeholder")


class _Inputs:
    """What the layers share: the mask as the operator wants it, and tables of angles."""

    def __init__(self, model: TracedModel) -> None:
        self.model = model
        self.longest: int | None = None
        self._biases: dict[Node, Node] = {}
        self._tables: dict[tuple[str, Any, float], Node] = {}

    def bias(self, mask: Any) -> Node:
        """Return the mask as what is added to scores, made once a mask, before the first attention that needs it.

        The operator hides later slots itself. Of two tokens the later one has the later slot, wherever padding lies, so a mask
        that hides nothing else but padding needs no positions.
        """
        if mask not in self._biases:
            key_mask, kind = mask.args[1:3]
            if kind == "causal" and key_mask is not None:
                tokens = next(iter(self.model.placeholders().values()))
                made = call(self.model.graph, torch.ops.calque.padding_bias.default, key_mask, tokens)
            else:
                made = call(self.model.graph, torch.ops.calque.mask_bias.default, mask)
            self._biases[mask] = made
        return self._biases[mask]

    def tables(self, layer: _Layer) -> tuple[Node, Node] | None:
        """Return cosines and sines [longest, R/2] by slot; None where frequencies change, or a kernel has no such size."""
        if not calls(layer.query, rotary) or not calls(layer.key, rotary) or layer.query.args[1:] != layer.key.args[1:]:
            return None
        # The kernel turns multiples of 16 elements, and at most the whole sixteenths of a head.
        angles: Any = layer.query.args
        turned, size = int(angles[4]), int(layer.query.meta["val"].shape[3])
        if turned % 16 or turned > size // 16 * 16:
            return None
        cos, sin = (self._table(factor) for factor in angles[1:3])
        return (cos, sin) if cos is not None and sin is not None else None

    def _table(self, angles: Any) -> Node | None:
        """Return the table of one kind of angles: made once, wherever the model works them out again."""
        found, longest, constants = wave(angles), self.model.trained_length, self.model.constants()
        if longest is None or found is None:
            return None
        target, turns, scale = found
        function = torch.cos if target is aten.cos.default else torch.sin
        for positions, frequencies in factors(turns):
            if frequencies in constants and frequencies.meta["val"].dim() == 1 and _is_positions(self.model, positions):
                name = constants[frequencies]
                if (name, function, scale) not in self._tables:
                    weight = _angle_table(self.model.constant(name), longest, function, scale)
                    called = f"{name}.{function.__name__}" + ("" if scale == 1.0 else f"_times_{scale:g}")
                    self._tables[name, function, scale] = self.model.add_parameter(called, weight, like=frequencies)
                self.longest = longest
                return self._tables[name, function, scale]
        return None


def _is_positions(model: TracedModel, value: Any) -> bool:
    """Return whether a value is the positions [B, S, 1] as numbers."""
    while calls(value, aten._to_copy.default) or calls(value, aten.unsqueeze.default):
        value = value.args[0]
    return value is model.placeholders()["position_ids"]


def _angle_table(frequencies: torch.Tensor, longest: int, function: Any, scale: float) -> Derived:
    def made() -> torch.Tensor:
        table: torch.Tensor = function(torch.arange(longest, dtype=torch.float32)[:, None] * frequencies.float()) * scale
        return table

    return Derived(
        (), f"{function.__name__} of positions below {longest}, times {scale}", made, "float32", (longest, *frequencies.shape), moved=False
    )


def _join(model: TracedModel, layer: _Layer, inputs: _Inputs, gaps: bool) -> None:
    graph = model.graph
    heads, groups = layer.heads
    tables = None if gaps else inputs.tables(layer)
    lengths = None if gaps else model.placeholders()["attention_mask"]
    scale, softcap, sinks = layer.attention.args[4:7]
    with graph.inserting_before(layer.attention):
        query = _flat(graph, layer.query, heads, turned=tables is None)
        key = _flat(graph, layer.key, groups, turned=tables is None)
        value = _flat(graph, layer.value, groups)
        bias = inputs.bias(layer.attention.args[3]) if gaps else None
        cos, sin, interleaved = (*tables, layer.query.args[3]) if tables else (None, None, False)
        fused = call(
            graph, grouped, query, key, value, layer.past_key, layer.past_value, bias, lengths, cos, sin, sinks,
            heads, groups, scale, softcap, 0 if gaps else layer.window, interleaved,
        )  # fmt: skip
        out, whole_key, whole_value = (call(graph, getitem, fused, index) for index in range(3))
    layer.whole_key.replace_all_uses_with(whole_key)
    layer.whole_value.replace_all_uses_with(whole_value)
    _hand_on(graph, layer, out, heads)


def _flat(graph: torch.fx.Graph, part: Any, heads: int, turned: bool = True) -> Node:
    """Return heads [B, H, S, D] as a projection gave them, [B, S, H·D]; normed where they were, rotated too if ``turned``."""
    if calls(part, rotary):
        value, *angles = part.args
        flat = _flat(graph, value, heads)
        return call(graph, flat_rotary, flat, *angles, heads) if turned else flat
    if calls(part, rms_norm):
        return call(graph, torch.ops.calque.flat_rms_norm.default, _flat(graph, part.args[0], heads), *part.args[1:], heads)
    if calls(part, aten.transpose.int) and set(part.args[1:]) == {1, 2}:
        return _beside(graph, part.args[0], heads)
    return call(graph, join_heads, call(graph, aten.transpose.int, part, 1, 2))


def _beside(graph: torch.fx.Graph, apart: Any, heads: int) -> Node:
    """Return heads [B, S, H, D] as a projection gave them, [B, S, H·D]; normed where they were."""
    if calls(apart, rms_norm):
        return call(graph, torch.ops.calque.flat_rms_norm.default, _beside(graph, apart.args[0], heads), *apart.args[1:], heads)
    whole: Node | None = apart.args[0] if calls(apart, aten.reshape.default) else None
    if whole is not None and whole.meta["val"].dim() == 3 and _same(whole.meta["val"].shape[2], heads * apart.meta["val"].shape[3]):
        return whole
    return call(graph, join_heads, apart)


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one == other


def _hand_on(graph: torch.fx.Graph, layer: _Layer, out: Node, heads: int) -> None:
    """Give ``out`` [B, S, H·D] to what read the attention [B, H, S, D], which mostly wants it in that form."""
    apart = only_user(layer.attention)
    whole = only_user(apart) if apart is not None and calls(apart, aten.transpose.int) and set(apart.args[1:]) == {1, 2} else None
    if (
        whole is not None
        and calls(whole, aten.reshape.default)
        and whole.meta["val"].dim() == 3
        and _same(whole.meta["val"].shape[2], out.meta["val"].shape[2])
    ):
        whole.replace_all_uses_with(out)
        return
    with graph.inserting_after(out):
        split = call(graph, torch.ops.calque.split_heads.default, out, heads)
    with graph.inserting_after(split):
        layer.attention.replace_all_uses_with(call(graph, aten.transpose.int, split, 1, 2))
