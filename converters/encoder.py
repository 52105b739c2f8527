"""Encoders: BERT and its relatives, with or without a head; one call sees a whole text, nothing is carried on.

::

    input_ids          int64 [batch_size, sequence_length]
    attention_mask     int64 [batch_size, sequence_length]
    token_type_ids     int64 [batch_size, sequence_length]   only where the model tells segments apart
      -> feature-extraction      last_hidden_state [batch_size, sequence_length, hidden], pooler_output [batch_size, hidden]
         sentence-similarity     last_hidden_state; the pass pool_sentences makes sentence_embedding of it
         fill-mask               logits [batch_size, sequence_length, vocabulary]
         text-classification     logits [batch_size, labels]
         token-classification    logits [batch_size, sequence_length, labels]
         question-answering      start_logits, end_logits [batch_size, sequence_length]

Names are those of optimum. Positions count the attention mask where the model takes positions, so padding may lie anywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx import Node
from transformers import PreTrainedModel

from calque.artifact import Limits, TensorSpec
from calque.converters import causal_lm, patches
from calque.converters.positions import known
from calque.converters.tidy import tidy
from calque.converters.weight_names import weight_table
from calque.errors import Unsupported
from calque.source import ModelSource
from calque.traced import TracedModel, user_nodes

aten = torch.ops.aten

OUTPUTS = {
    "feature-extraction": ("last_hidden_state", "pooler_output"),
    "sentence-similarity": ("last_hidden_state",),
    "fill-mask": ("logits",),
    "text-classification": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
}

# Example sizes while tracing: none is 0 or 1, which export would bake in, and they differ.
BATCH, SEQUENCE = 2, 5
CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)
POSITIONS_FROM_IDS = "create_position_ids_from_input_ids"


def trace(source: ModelSource) -> TracedModel:
    """Return the model as one graph of semantic operators, with fake parameters and a table of where their bytes are.

    Raises:
        Unsupported: the model takes more than tokens, or its code cannot be held by one graph.
        WeightMismatch: the ledger does not balance.
    """
    causal_lm.guard(source)
    if getattr(source.config, "is_encoder_decoder", False) and source.auto_class != "AutoModelForTextEncoding":
        raise Unsupported(
            f"{source.id} ({source.config.model_type}) encodes and decodes; {source.task.name} converts encoders",
            fix="encoder-decoder models follow; of some, T5's among them, feature-extraction converts the encoder",
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = causal_lm.build(source, mode)
    limits, _ = patches.apply(model)
    table = weight_table(model, source.weights, source.id, _other_heads(model, list(source.tensors)))
    segments = _tells_segments_apart(model)
    names = _output_names(model, source, mode, segments)
    program = _export(model, mode, names, segments)
    inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))
    traced = TracedModel(
        program=program,
        weights=table,
        states=(),
        inputs=tuple(TensorSpec(name, "int64", ("batch_size", "sequence_length")) for name in inputs),
        outputs=_outputs(program, names),
        limits=limits,
        settled=True,
    )
    tidy(traced)
    traced.limits = with_positions(traced)
    causal_lm.require(traced, table.entries)
    return traced


def _other_heads(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Return patterns of the tensors that belong to heads of the checkpoint which this task has no use for.

    They lie beside the encoder, under a prefix of their own, where the checkpoint was saved with a head; poolers too.
    """
    prefix = model.base_model_prefix
    saved_with_head = prefix and any(name.startswith(f"{prefix}.") for name in names)
    return [r"(^|\.)pooler\.", *([rf"^(?!{prefix}\.)"] if saved_with_head else [])]


def _tells_segments_apart(model: PreTrainedModel) -> bool:
    return "token_type_ids" in _parameters(model) and (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def _parameters(model: PreTrainedModel) -> Any:
    return inspect.signature(type(model).forward).parameters


def _call(model: PreTrainedModel, ids: Tensor, mask: Tensor, segments: tuple[Tensor, ...]) -> Any:
    """Return the model's answer; positions count the mask, unless the model counts the tokens that are no padding itself."""
    takes = _parameters(model)
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if segments:
        extra["token_type_ids"] = segments[0]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if "position_ids" in takes and not _counts_positions_itself(model):
        extra["position_ids"] = positions
    with known(positions, mask):
        return type(model).forward(model, input_ids=ids, attention_mask=mask, return_dict=True, **extra)


def _counts_positions_itself(model: PreTrainedModel) -> bool:
    places = (inspect.getmodule(type(model)), *model.modules())
    return any(hasattr(place, POSITIONS_FROM_IDS) for place in places)


def _output_names(model: PreTrainedModel, source: ModelSource, mode: FakeTensorMode, segments: bool) -> tuple[str, ...]:
    """Return which of the task's outputs the model gives, by running once on fake tensors."""
    with mode, torch.no_grad():
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        try:
            out = _call(model, ids, torch.ones_like(ids), (ids,) if segments else ())
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise Unsupported(
                f"{model.config.model_type} does not run on tokens alone: {type(error).__name__}: {error}",
                fix="it needs inputs of another kind, or data-dependent code that this release has no operator for",
            ) from error
    wanted = OUTPUTS[source.task.name]
    names = tuple(name for name in wanted if isinstance(getattr(out, name, None), Tensor))
    if not names:
        raise Unsupported(f"{type(model).__name__} gives none of {', '.join(wanted)}", fix=f"it is no model for {source.task.name}")
    return names


def _export(model: PreTrainedModel, mode: FakeTensorMode, names: tuple[str, ...], segments: bool) -> torch.export.ExportedProgram:
    """Return the program, batch and length dynamic."""

    def forward(self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *token_type_ids: Tensor) -> tuple[Tensor, ...]:
        out = _call(self, input_ids, attention_mask, token_type_ids)
        return tuple(getattr(out, name) for name in names)

    # Exported as itself, not inside a wrapper, so that parameter names stay those of the checkpoint.
    model.forward = MethodType(forward, model)
    with mode:
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        extra = (torch.zeros_like(ids),) if segments else ()
        arguments = (ids, torch.ones_like(ids), *extra)
    sizes = {0: Dim("batch_size"), 1: Dim("sequence_length")}
    dims = (sizes, sizes, *(((sizes,),) if extra else ()))
    return causal_lm.exported(model, arguments, dims)


def _outputs(program: torch.export.ExportedProgram, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """Return the outputs: a batch first, then, where the size is no constant, the sequence."""
    returned: Any = next(node for node in reversed(program.graph.nodes) if node.op == "output").args[0]

    def shape(node: Node) -> tuple[int | str, ...]:
        rest = node.meta["val"].shape[1:]
        return ("batch_size", *(size if isinstance(size, int) else "sequence_length" for size in rest))

    return tuple(TensorSpec(name, "float32", shape(node)) for name, node in zip(names, returned, strict=True))


def with_positions(model: TracedModel) -> Limits:
    """Return the limits that tables of learned positions set: ``max_length`` where one ends, padding where it counts columns."""
    limits = model.limits
    for node in user_nodes(model.graph.nodes, aten.embedding.default):
        values, told = _evaluate(model, node.args[1])
        if values is None or not _counts_up(values):
            continue
        length = int(node.args[0].meta["val"].shape[0]) - int(values.reshape(-1)[0])  # type: ignore[union-attr]
        limits = replace(limits, max_length=min(length, limits.max_length or length))
        if not told:
            limits = replace(limits, padding="right")
    if _mixes_columns(model):
        return replace(limits, padding="none")
    return replace(limits, padding="right") if _reads_first_column(model) else limits


def _mixes_columns(model: TracedModel) -> bool:
    """Return whether something mixes neighbouring columns whatever the mask says: a convolution, a Fourier transform."""
    convolutions = [node for target in CONVOLUTIONS for node in user_nodes(model.graph.nodes, target)]
    wide = any(max(node.args[1].meta["val"].shape[2:]) > 1 for node in convolutions)  # type: ignore[union-attr]
    return wide or any(
        user_nodes(model.graph.nodes, target) for target in (aten.fft_fft.default, aten.fft_fftn.default, aten._fft_c2c.default)
    )


def _reads_first_column(model: TracedModel) -> bool:
    """Return whether a pooler or head takes the token in the first column for the first of the text."""
    selects = [node for node in user_nodes(model.graph.nodes, aten.select.int) if node.args[1:] == (1, 0)]
    slices = [node for node in user_nodes(model.graph.nodes, aten.slice.Tensor) if node.args[1:] == (1, 0, 1)]
    tensors = [node.args[0].meta["val"] for node in (*selects, *slices)]  # type: ignore[union-attr]
    return any(tensor.is_floating_point() and tensor.ndim == 3 for tensor in tensors)


def _counts_up(index: Tensor) -> bool:
    """Return whether every row of an index is p, p + 1, … over the whole length, as positions are."""
    if index.ndim == 0 or index.shape[-1] != SEQUENCE:
        return False
    rows = index.reshape(-1, SEQUENCE)
    return bool((rows == rows[0, 0] + torch.arange(SEQUENCE)).all())


def _evaluate(model: TracedModel, index: Any) -> tuple[Tensor | None, bool]:
    """Return an index for a text whose tokens are all alike, and whether the text or its mask had a say; None for parameters.

    Equal tokens, so that an index made of the tokens themselves does not look like positions.
    """
    inputs = {
        name: torch.full((BATCH, SEQUENCE), 3 if name == "input_ids" else int(name == "attention_mask")) for name in model.placeholders()
    }
    users = {node: name for name, node in model.placeholders().items()}
    targets = {spec.arg.name: spec.target for spec in model.program.graph_signature.input_specs}
    known: dict[Node, Any] = {}
    for node in _ancestors(index):
        if node in users:
            known[node] = inputs[users[node]]
        elif node.op == "placeholder":
            if node.name not in targets or targets[node.name] in model.weights:
                return None, False
            known[node] = model.constant(str(targets[node.name]))
        else:
            arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            target: Any = node.target
            known[node] = target(*arguments, **keywords)
    value = known.get(index)
    return (value if isinstance(value, Tensor) else None), any(_has_a_say(node, users, known) for node in known)


def _has_a_say(node: Node, inputs: Container[Node], known: Container[Node]) -> bool:
    """Return whether the known nodes read an input's values, not only its sizes."""
    return node in inputs and any(user in known and user.target is not aten.sym_size.int for user in node.users)


def _ancestors(node: Any) -> list[Node]:
    """Return the node and all above it, each after those it reads."""
    order: dict[Node, None] = {}
    stack = [(node, False)] if isinstance(node, Node) else []
    while stack:
        current, ready = stack.pop()
        if ready:
            order[current] = None
        elif current not in order:
            stack.append((current, True))
            stack.extend((above, False) for above in current.all_input_nodes)
    return list(order)
