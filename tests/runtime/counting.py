"""A model that counts: after token n comes n + 1, computed through its cache, as a folder of three small files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from calque.artifact import Artifact, GraphSpec, Limits, TensorSpec, file_sha256
from calque.states import key_value_states

WORDS = ["<s>", "</s>", "user", "assistant", "one", "two", "three", "four", "five", "six", "seven", "eight"]
SIZE = len(WORDS)


@dataclass(frozen=True)
class Counting:
    """How the folder is made."""

    limits: Limits = field(default_factory=Limits)
    keep_input: bool = False
    target: str = "onnxruntime"


def write_counting(folder: Path, made: Counting | None = None) -> Artifact:
    """The folder is an artifact. Logits at a position depend on the newest key and on how many slots the cache holds.

    That makes a lost or shortened cache visible: ``logits = onehot(token + 1) + 0.01 · slots``.
    """
    made = made or Counting()
    inputs = [
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
        TensorSpec("position_ids", "int64", ("batch_size", "sequence_length")),
    ]
    inputs += [TensorSpec("num_logits_to_keep", "int64", ())] if made.keep_input else []
    states = key_value_states(0, 1, SIZE, SIZE, None)
    inputs += [TensorSpec(state.input, "float32", state.shape) for state in states]
    outputs = [TensorSpec("logits", "float32", ("batch_size", "sequence_length", SIZE))]
    outputs += [TensorSpec(s.output, "float32", ("batch_size", 1, "total_sequence_length", SIZE)) for s in states]
    onnx.save(_graph(inputs, outputs, made.keep_input), folder / "model.onnx")
    _tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "generation_config.json", {"eos_token_id": [1]})
    spec = GraphSpec("model.onnx", tuple(inputs), tuple(outputs))
    files = {name: file_sha256(folder / name) for name in ("model.onnx", "tokenizer.json", "generation_config.json")}
    artifact = Artifact(
        folder, made.target, {}, {}, "fp32", files, {"model": spec}, states, {}, {}, made.limits,
    )  # fmt: skip
    artifact.write_manifest()
    return artifact


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def _graph(inputs: list[TensorSpec], outputs: list[TensorSpec], keep_input: bool) -> onnx.ModelProto:
    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}

    def info(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(spec.name, types[spec.dtype], list(spec.shape))

    constants: dict[str, np.ndarray[Any, Any]] = {
        "next": np.roll(np.eye(SIZE, dtype=np.float32), 1, axis=1),
        "head": np.array([1], np.int64),
        "weight": np.array(0.01, np.float32),
        "two": np.array(2, np.int64),
        "zero": np.array([0], np.int64),
        "end": np.array([np.iinfo(np.int64).max], np.int64),
        "one_d": np.array([-1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["next", "input_ids"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "head"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        helper.make_node("Shape", ["present.0.key"], ["shape"]),
        helper.make_node("Gather", ["shape", "two"], ["slots"]),
        helper.make_node("Cast", ["slots"], ["slots_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["slots_f", "weight"], ["bonus"]),
        helper.make_node("Add", ["row", "bonus"], ["all" if keep_input else "logits"]),
    ]
    if keep_input:
        nodes += [
            helper.make_node("Neg", ["num_logits_to_keep"], ["from"]),
            helper.make_node("Reshape", ["from", "one_d"], ["start"]),
            helper.make_node("Slice", ["all", "start", "end", "head"], ["logits"]),
        ]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "counting", [info(s) for s in inputs], [info(s) for s in outputs], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
