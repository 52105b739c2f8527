"""Two small graphs with caches of their own kinds, as artifacts: static slots, and GroupQueryAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calque.artifact import Artifact, GraphSpec, Limits, TensorSpec, file_sha256
from calque.states import StateSpec, Update, key_value_states

Weights = dict[str, np.ndarray[Any, Any]]
VOCABULARY, SIZE, SLOTS = 16, 8, 6
TYPES = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
LOGITS = TensorSpec("logits", "float32", ("batch_size", "sequence_length", VOCABULARY))
IDS = TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))
MASK = TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length"))


def table(columns: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(VOCABULARY, columns)).astype(np.float32)


def write_static(folder: Path, recurrent: Update | None = None) -> Artifact:
    """The logits of a call are ``table[token] + Σ (slot + 1) · key`` over the slots that are valid after it, in every column.

    TensorScatter warns when it has to copy the cache, and writes in place where past and present are the same memory.
    ``recurrent``: a second layer keeps the sum of all token ids, changed in that way, which is added to every logit.
    """
    states = tuple(replace(state, update="in_place", grow_axis=None, shape=("batch_size", 1, SLOTS, SIZE)) for state in _states())
    names = "past_key_values.1.recurrent", "present.1.recurrent"
    total = [StateSpec(1, "recurrent", *names, None, recurrent, None, "float32", ("batch_size", 1))] if recurrent else []
    inputs = [
        IDS,
        TensorSpec("position_ids", "int64", ("batch_size", "sequence_length")),
        TensorSpec("write_indices", "int64", ("batch_size",)),
        TensorSpec("kv_lengths", "int32", ("batch_size",)),
        *(TensorSpec(state.input, "float32", state.shape) for state in (*states, *total)),
    ]
    outputs = [LOGITS, *(TensorSpec(state.output, "float32", state.shape) for state in (*states, *total))]
    weights: Weights = {
        "embedding": table(SIZE, 1),
        "table": table(VOCABULARY, 2),
        "slots": np.arange(SLOTS, dtype=np.int32)[None],
        "numbers": np.arange(1, SLOTS + 1, dtype=np.float32)[None],
        "axes": np.array([1, 3], np.int64),
        "one": np.array([1], np.int64),
        "columns": np.array([1, 2], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "one"], ["new"]),
        *(helper.make_node("TensorScatter", [state.input, "new", "write_indices"], [state.output], axis=2) for state in states),
        helper.make_node("ReduceSum", ["present.0.key", "axes"], ["sums"], keepdims=0),
        helper.make_node("Unsqueeze", ["kv_lengths", "one"], ["lengths"]),
        helper.make_node("Less", ["slots", "lengths"], ["valid"]),
        helper.make_node("Cast", ["valid"], ["valid_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sums", "valid_f"], ["valid_sums"]),
        helper.make_node("Mul", ["valid_sums", "numbers"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "one"], ["score"], keepdims=0),
        helper.make_node("Unsqueeze", ["score", "columns"], ["score_3"]),
        helper.make_node("Gather", ["table", "input_ids"], ["row"]),
        helper.make_node("Add", ["row", "score_3"], ["without" if recurrent else "logits"]),
    ]
    if recurrent:
        nodes += [
            helper.make_node("Cast", ["input_ids"], ["numbers_f"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["numbers_f", "one"], ["more"], keepdims=1),
            helper.make_node("Add", [names[0], "more"], [names[1]]),
            helper.make_node("Unsqueeze", [names[1], "one"], ["total"]),
            helper.make_node("Add", ["without", "total"], ["logits"]),
        ]
    return _write(folder, nodes, weights, inputs, outputs, (*states, *total), Limits(padding="right", max_length=SLOTS))


def write_grouped(folder: Path, reads_length: bool = False, window: int = -1) -> Artifact:
    """Attention with its cache is one operator; ``reads_length``: another node takes the length of the cache from its shape.

    ``window``: how many slots each token sees, its own among them; -1 is all.
    """
    states = _states()
    inputs = [IDS, MASK, *(TensorSpec(state.input, "float32", state.shape) for state in states)]
    outputs = [LOGITS, *(TensorSpec(s.output, "float32", ("batch_size", 1, "total_sequence_length", SIZE)) for s in states)]
    weights: Weights = {
        "query": table(2 * SIZE, 3),
        "key": table(SIZE, 4),
        "value": table(SIZE, 5),
        "head": table(2 * SIZE, 6).T.copy(),
        "one": np.array([1], np.int64),
    }
    attention = ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "last", "total"]
    present = ["present.0.key", "present.0.value"]
    heads: dict[str, Any] = {"num_heads": 2, "kv_num_heads": 1, "local_window_size": window}
    nodes = [
        *(helper.make_node("Gather", [name, "input_ids"], [name[0]]) for name in ("query", "key", "value")),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["held"], keepdims=0),
        helper.make_node("Sub", ["held", "one"], ["last_l"]),
        helper.make_node("Cast", ["last_l"], ["last"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["width"], start=1, end=2),
        helper.make_node("Squeeze", ["width"], ["width_s"]),
        helper.make_node("Cast", ["width_s"], ["total"], to=TensorProto.INT32),
        helper.make_node("GroupQueryAttention", attention, ["out", *present], domain="com.microsoft", **heads),
        helper.make_node("MatMul", ["out", "head"], ["product" if reads_length else "logits"]),
    ]
    if reads_length:
        nodes += [
            helper.make_node("Shape", ["past_key_values.0.key"], ["past"], start=2, end=3),
            helper.make_node("Cast", ["past"], ["past_f"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["product", "past_f"], ["logits"]),
        ]
    return _write(folder, nodes, weights, inputs, outputs, states, Limits(padding="right", batched_chunk=False))


def _states() -> tuple[StateSpec, ...]:
    return key_value_states(0, 1, SIZE, SIZE, None)


def _write(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Weights,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    states: tuple[StateSpec, ...],
    limits: Limits,
) -> Artifact:
    def infos(specs: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], list(spec.shape)) for spec in specs]

    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "cached", infos(inputs), infos(outputs), tensors)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), folder / "model.onnx")
    spec = GraphSpec("model.onnx", tuple(inputs), tuple(outputs))
    files = {"model.onnx": file_sha256(folder / "model.onnx")}
    artifact = Artifact(folder, "onnxruntime", {}, {}, "fp32", files, {"model": spec}, states, {}, {}, limits)
    artifact.write_manifest()
    return artifact
