"""Causal language models: any architecture that transformers knows, traced once, with no code of its own.

::

    input_ids          int64 [batch_size, sequence_length]
    attention_mask     int64 [batch_size, total_sequence_length]
    position_ids       int64 [batch_size, sequence_length]
    <one abstract state per key and value>  [batch_size, heads, past_sequence_length, size]
      -> logits        float32 [batch_size, sequence_length, vocabulary]
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx import Node
from transformers import PreTrainedModel

from calque.artifact import Limits, TensorSpec
from calque.converters import patches, semantic
from calque.converters.complex_numbers import write_in_real_numbers
from calque.converters.positions import known
from calque.converters.tidy import tidy
from calque.converters.weight_names import weight_table
from calque.errors import Unsupported
from calque.fake import buildable, fake_parameters
from calque.source import ModelSource
from calque.states import StateSpec, key_value_states
from calque.traced import TracedModel, user_nodes

# Layer kinds whose whole state is keys and values. Anything else a config names needs states of another kind.
KEY_VALUE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "moe", "mlp", "dense", "sparse"}

# What an index goes through between its offset and its table.
RESHAPES = {
    torch.ops.aten.reshape.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.repeat.default,
    torch.ops.aten._to_copy.default,
}

OTHER_STATES = {
    "indexed_attention": "the keys of an index, which picks what attention sees",
    "compressed_sparse_attention": "compressed keys and values",
    "heavily_compressed_attention": "compressed keys and values",
    "minimax_m3_sparse": "the keys of an index, which picks what attention sees",
}

# Example sizes while tracing: none is 0 or 1, which export would bake in, and no two mean the same.
BATCH, SEQUENCE, PAST = 2, 3, 5


def trace(source: ModelSource) -> TracedModel:
    """Return the model as one graph of semantic operators, with fake parameters and a table of where their bytes are.

    Raises:
        Unsupported: not a causal language model, or one that needs more than keys and values as state.
        WeightMismatch: the ledger does not balance.
    """
    guard(source)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = build(source, mode)
    limits, _ = patches.apply(model)
    table = weight_table(model, source.weights, source.id)
    layers = record_layers(model, mode)
    program = export(model, mode, layers)
    states = tuple(spec for layer, sizes in layers.items() for spec in key_value_states(layer, *sizes, window=None))
    traced = TracedModel(
        program=program,
        weights=table,
        states=states,
        inputs=(*_inputs(), *(TensorSpec(state.input, "float32", state.shape) for state in states)),
        outputs=(_logits(program),),
        limits=limits,
        trained_length=getattr(source.config.get_text_config(), "max_position_embeddings", None),
    )
    tidy(traced)
    write_in_real_numbers(traced)
    traced.states = with_windows(traced)
    traced.limits = with_learned_positions(traced)
    require(traced, table.entries)
    return traced


def guard(source: ModelSource) -> None:
    """Leave quietly if keys and values are all the state that the config's model needs."""
    config = source.config
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - KEY_VALUE_LAYERS
    if kinds:
        raise Unsupported(
            f"{source.id} ({config.model_type}) needs states besides keys and values",
            [f"layers of type {kind}: {OTHER_STATES.get(kind, 'convolutional or recurrent state')}" for kind in sorted(kinds)],
            "this release converts attention models; other states follow",
        )


def build(source: ModelSource, mode: FakeTensorMode) -> PreTrainedModel:
    """Return the model in float32 with fake parameters, its attention, masks and experts replaced by semantic operators.

    Architectures with attention code of their own are left on it and stay ATen; where all of it is their own, their masks say what they
    mean all the same.
    """
    semantic.register()
    config = copy.deepcopy(source.config)
    config._attn_implementation = "eager"
    with buildable(config), fake_parameters(mode):
        made: Any = getattr(transformers, source.auto_class).from_config(
            config, dtype=torch.float32, trust_remote_code=source.trust_remote_code, **source.model_options()
        )
    model: PreTrainedModel = made.eval().requires_grad_(False)
    backbone = type(model)
    if backbone._can_set_attn_implementation() and not _own_table_of_attentions(backbone):
        model.set_attn_implementation(semantic.NAME)
    elif not any("ALL_ATTENTION_FUNCTIONS" in vars(inspect.getmodule(type(part)) or object) for part in model.modules()):
        # Where attention is looked up by this name too, it is none that there is.
        model.config._attn_implementation = semantic.ADDED
    if backbone._can_set_experts_implementation():
        model.set_experts_implementation(semantic.NAME)
    return model


def _own_table_of_attentions(model_class: type) -> bool:
    """Return whether attention classes are picked by name from a table of the modeling file, where ours is unknown."""
    module = inspect.getmodule(model_class)
    return any(name.endswith("ATTENTION_CLASSES") for name in vars(module or object))


def record_layers(model: PreTrainedModel, mode: FakeTensorMode) -> dict[int, tuple[int, int, int]]:
    """Return heads, key size and value size of every layer that keeps keys and values, by running once on fake tensors."""
    cache = semantic.RecordingCache()
    with mode, torch.no_grad():
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        try:
            _call(model, ids, torch.ones_like(ids), ids, cache)
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise Unsupported(
                f"{model.config.model_type} does not run with a plain cache of keys and values: {type(error).__name__}: {error}",
                fix="it needs states or data-dependent code that this release has no operator for",
            ) from error
    if not cache.seen:
        raise Unsupported(
            f"{model.config.model_type} keeps no keys and values", fix="models without an attention cache follow in a later release"
        )
    return dict(sorted(cache.seen.items()))


def _call(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Return the logits; positions are given to the models that take them, the others count the mask."""
    forward = type(model).forward
    extra = {"position_ids": positions} if _takes_positions(model) else {}
    with known(positions, mask):
        out = forward(model, input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, **extra)
    logits: Tensor = out.logits
    return logits


def _takes_positions(model: PreTrainedModel) -> bool:
    """Return whether positions may be given to the model: by name, or among what it hands on to its decoder."""
    parameters = inspect.signature(type(model).forward).parameters
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[no-untyped-call]
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    inner = inspect.signature(type(decoder).forward).parameters if hands_on and decoder is not None else {}
    return "position_ids" in parameters or "position_ids" in inner


def export(model: PreTrainedModel, mode: FakeTensorMode, layers: dict[int, tuple[int, int, int]]) -> torch.export.ExportedProgram:
    """Return the program, with every dynamic dimension dynamic and lengths tied by ``total = past + sequence``."""

    def forward(self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Tensor:
        torch._check(  # type: ignore[no-untyped-call]
            attention_mask.shape[1] == past[0].shape[2] + input_ids.shape[1]
        )
        return _call(self, input_ids, attention_mask, position_ids, semantic.TracedCache(list(layers), past))

    # Exported as itself, not inside a wrapper, so that parameter names stay those of the checkpoint.
    model.forward = MethodType(forward, model)
    with mode:
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        past = tuple(
            torch.empty(BATCH, heads, PAST, size) for heads, key, value in layers.values() for size in (key, value)
        )  # fmt: skip
        mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64)
    batch, sequence, held = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    dims = ({0: batch, 1: sequence}, {0: batch, 1: Dim.DYNAMIC}, {0: batch, 1: sequence}, tuple({0: batch, 2: held} for _ in past))
    return exported(model, (ids, mask, torch.zeros_like(ids), *past), dims)


def exported(model: PreTrainedModel, arguments: tuple[Tensor, ...], dims: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """Return the program of ``model.forward``, which was put there for the trace and is taken away again.

    Raises:
        Unsupported: the model's code cannot be held by one graph.
    """
    try:
        with torch.no_grad():
            return torch.export.export(model, arguments, dynamic_shapes=dims, strict=False)
    except Exception as error:  # torch.export documents no common error class; all of them mean the same here
        raise Unsupported(
            f"{model.config.model_type} cannot be traced: {type(error).__name__}",
            [line for line in str(error).splitlines() if line.strip()],
            "the model's code depends on data or on lengths in a way that one graph cannot hold",
        ) from error
    finally:
        del model.forward


def _inputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
        TensorSpec("position_ids", "int64", ("batch_size", "sequence_length")),
    )


def _logits(program: torch.export.ExportedProgram) -> TensorSpec:
    node = next(node for node in reversed(program.graph.nodes) if node.op == "output").args[0][0]
    return TensorSpec("logits", "float32", ("batch_size", "sequence_length", int(node.meta["val"].shape[-1])))


def with_windows(model: TracedModel) -> tuple[StateSpec, ...]:
    """Return the states with the sliding window of their layer, read off the mask that its attention uses."""
    windows: dict[int, int] = {}
    for attention in user_nodes(model.graph.nodes, torch.ops.calque.attention.default):
        mask = attention.args[3]
        if not isinstance(mask, Node) or mask.target is not torch.ops.calque.attention_mask.default:
            continue
        # One with an overlay is custom, and keeps its window where it is a sliding one.
        if mask.args[2] not in ("sliding", "custom") or not mask.args[3]:
            continue
        update = _ancestor(attention.args[1], torch.ops.calque.cache_update.default)
        if update is not None:
            windows[int(str(update.args[2]).split(".")[0])] = int(mask.args[3])  # type: ignore[arg-type]
    return tuple(replace(state, window=windows.get(state.layer)) for state in model.states)


def _ancestor(node: Any, target: Any) -> Node | None:
    """Return the nearest node of ``target`` above ``node`` along first arguments."""
    while isinstance(node, Node) and node.op == "call_function" and node.target is not target:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "call_function" else None


def with_learned_positions(model: TracedModel) -> Limits:
    """Return the limits with ``max_length`` where a table of positions ends: past it there is no row to read."""
    positions = {model.placeholders()[name] for name in ("position_ids", "attention_mask")}
    limits = model.limits
    for node in model.graph.nodes:
        for table, axis, index in _lookups(node):
            offset, index = _offset(index)
            rows = table.meta["val"].shape[axis]
            if isinstance(rows, int) and _depends_only_on(index, positions):
                limits = replace(limits, max_length=min(rows - offset, limits.max_length or rows))
    return limits


def _lookups(node: Node) -> list[tuple[Node, int, Node]]:
    """Return what the node reads by index: the table, along which axis, at which indices (learned, or sines as in GPT-J)."""
    aten = torch.ops.aten
    args: Any = node.args
    if node.target is aten.embedding.default:
        return [(args[0], 0, args[1])]
    if node.target in (aten.index_select.default, aten.gather.default):
        return [(args[0], args[1], args[2])]
    if node.target is aten.index.Tensor:
        return [(args[0], axis, index) for axis, index in enumerate(args[1]) if index is not None]
    return []


def _offset(node: Any) -> tuple[int, Any]:
    """Return the constant added to an index, and the index before it was added (OPT's table begins at row 2)."""
    offset = 0
    while isinstance(node, Node):
        if node.target is torch.ops.aten.add.Tensor and isinstance(node.args[1], int):
            offset += node.args[1]
        elif node.target not in RESHAPES:
            break
        node = node.args[0]
    return offset, node


def _depends_only_on(node: Any, roots: set[Node]) -> bool:
    seen: set[Node] = set()
    leaves: set[Node] = set()
    stack = [node] if isinstance(node, Node) else []
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            leaves.add(current)
        elif _lookups(current):
            return False  # what a table says of a position is no position
        stack.extend(current.all_input_nodes)
    tokens = {leaf for leaf in leaves if leaf.name == "input_ids"}
    return bool(leaves & roots) and not tokens


def require(model: TracedModel, entries: dict[str, Any]) -> None:
    """Make the ledger complete: the table holds what the graph reads, and asks for all of it.

    A buffer that the checkpoint lacks keeps the value the model computes for it, as it does when transformers loads it.
    """
    state = model.program.state_dict
    needed = {
        spec.target: tuple(int(size) for size in state[spec.target].shape)
        for spec in model.program.graph_signature.input_specs
        if spec.target in state and (spec.kind == InputKind.PARAMETER or spec.target in entries)
    }
    model.weights.required = needed
    model.weights.entries = {name: entries[name] for name in needed if name in entries}
