from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from calque import passes
from calque.packing import unpack
from calque.passes.quantize_weights import QuantizeWeights
from calque.targets._exact import SWITCH
from calque.targets.onnxruntime import OnnxRuntime
from tests.quantized_models import Quantized
from tests.tiny_models import traced

SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("int4", {}),
    ("int4", {"symmetric": False, "group": 16}),
    ("int8", {}),
    ("int8", {"group": 32}),
]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("precision", "options"), SCHEMES, ids=str)
def test_experts_run_as_one_operator_and_are_faithful(name: str, precision: str, options: dict[str, Any]) -> None:
    made = Quantized(name, precision, **options)
    assert len(made.nodes("QMoE")) == (1 if name == "qwen3_moe" else 2)
    assert made.faults() == []


@pytest.mark.parametrize(("precision", "options"), [("int8", {}), ("int4", {"overrides": {"*.down_proj": "int8"}})], ids=str)
def test_experts_that_the_kernel_cannot_do_are_dequantized_and_faithful(precision: str, options: dict[str, Any]) -> None:
    made = Quantized("mixtral", precision, OnnxRuntime(activations="float32"), **options)
    assert not made.nodes("QMoE")
    assert len(made.nodes("DequantizeLinear")) == 4
    assert made.faults() == []


def test_dequantized_experts_of_four_bits_are_two_in_a_byte() -> None:
    made = Quantized("mixtral", "int4", overrides={"*.down_proj": "int8"})
    types = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    assert types["model.layers.0.mlp.experts.gate_up_proj.q"] == onnx.TensorProto.INT4
    assert types["model.layers.0.mlp.experts.down_proj.q"] == onnx.TensorProto.INT8
    lengths = {
        tensor.name: int(entry.value) for tensor in made.graph.initializer for entry in tensor.external_data if entry.key == "length"
    }
    assert lengths["model.layers.0.mlp.experts.gate_up_proj.q"] == 4 * 192 * 64 // 2


def test_integers_in_the_file_are_those_of_the_graph() -> None:
    made, reference = Quantized("mixtral"), traced("mixtral")
    passes.run_one(QuantizeWeights(), reference)
    (node, _) = made.nodes("QMoE")
    tensors = {tensor.name: tensor for tensor in onnx.load(made.folder / "model.onnx").graph.initializer}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    q, scale = (reference.weights[f"{name}.{part}"].read() for part in ("q", "scale"))
    packed = torch.from_numpy(to_array(tensors[node.input[2]]).copy())
    found = unpack(packed.reshape(4 * 192, -1), 4, 64).reshape(4, 96, 2, 64)
    # Gate and value alternate in the file, and follow each other in the checkpoint.
    assert torch.equal(found.transpose(1, 2).reshape(4 * 192, 64), q)
    scales = to_array(tensors[node.input[3]]).reshape(4, 96, 2, 2)
    assert np.array_equal(scales.transpose(0, 2, 1, 3).reshape(4 * 192, 2), scale.numpy())


def test_experts_of_four_bits_take_an_eighth_of_the_bytes() -> None:
    made = Quantized("mixtral", "int4")
    held = sum(weight.read().numel() for name, weight in traced("mixtral").weights.entries.items() if ".experts." in name)
    stored = sum(
        int(entry.value)
        for tensor in made.graph.initializer
        if ".experts." in tensor.name
        for entry in tensor.external_data
        if entry.key == "length"
    )
    assert stored == held // 2 + held // 32 * 4


def test_switch_of_the_kernel_is_as_it_was_after_a_session_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Quantized("mixtral", "int8")
    session: Any = made.target.exact(made.artifact, 1)
    monkeypatch.delenv(SWITCH, raising=False)
    session.opened("model")
    assert SWITCH not in os.environ
    monkeypatch.setenv(SWITCH, "int8")
    made.target.exact(made.artifact, 1).opened("model")  # type: ignore[union-attr]
    assert os.environ[SWITCH] == "int8"
