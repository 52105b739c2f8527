"""ONNX Runtime's artifacts of 4 and 8 bits: the integers of the graph, the numbers of the eager model that holds them."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import numpy_helper

from calque.packing import unpack
from calque.session import Session
from calque.targets._exact import LEVEL
from calque.traced import user_nodes
from tests.quantized import Integers, integers
from tests.tiny_models import TYPES

# One of each kind; the other types with `-m slow`.
QUICK = ("llama", "gemma2", "gpt2", "mixtral", "bloom", "phi3-longrope")
CASES = [
    *(pytest.param(name, "int4", 16, True, "any", marks=() if name in QUICK else pytest.mark.slow) for name in TYPES),
    *((name, "int8", 0, True, "right") for name in ("llama", "qwen3", "gemma3_text", "gpt2")),
    ("llama", "int4", 32, False, "none"),
    ("llama", "int8", 16, False, "any"),
    ("qwen2", "int4", 64, True, "right"),
]


def exact(made: Integers) -> Session:
    session = made.target.exact(made.artifact)
    assert session is not None
    return session


@pytest.mark.parametrize(("name", "precision", "group", "symmetric", "padding"), CASES)
def test_an_artifact_of_integers_passes_both_questions(name: str, precision: str, group: int, symmetric: bool, padding: str) -> None:
    made = integers(name, precision, group, symmetric, padding)
    row = made.failed(exact(made))
    assert row is None, row
    row = made.failed(made.target.open(made.artifact), exact=False)
    assert row is None, row


@pytest.mark.parametrize(("precision", "symmetric"), [("int4", True), ("int4", False), ("int8", True)])
def test_the_integers_in_the_file_are_those_of_the_graph(precision: str, symmetric: bool) -> None:
    made = integers("llama", precision, symmetric=symmetric)
    file = onnx.load(made.artifact.folder / "model.onnx")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    bits = 8 if precision == "int8" else 4
    names = {node: name for name, node in made.plain.parameters().items()}
    found = 0
    for node in user_nodes(made.plain.graph.nodes, torch.ops.calque.dequantize_weight.default):
        q, scale, zero_point = (None if part is None else names[part] for part in node.args[:3])  # type: ignore[index]
        want = made.plain.weights[str(q)].read()
        if node.args[3] != bits:
            continue  # table and head, of 8 bits
        got = unpack(torch.from_numpy(held[f"{q}.packed"].copy()), bits, want.shape[1])
        assert torch.equal(got, want)
        if str(scale) in held:  # the few scales of a small table are laid for their lookup when constants are folded
            assert torch.equal(torch.from_numpy(held[str(scale)].copy()), made.plain.weights[str(scale)].read())
        if zero_point:
            want = made.plain.weights[zero_point].read()
            assert torch.equal(unpack(torch.from_numpy(held[f"{zero_point}.packed"].copy()), bits, want.shape[1]), want)
        found += 1
    assert found >= 8


def test_products_round_what_they_read_unless_told_otherwise() -> None:
    made = integers("llama")
    file = onnx.load(made.artifact.folder / "model.onnx", load_external_data=False)
    levels = [
        {attribute.name: attribute.i for attribute in node.attribute}.get(LEVEL)
        for node in file.graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert levels
    assert set(levels) == {4}


def test_rounding_is_measured_on_the_model_and_bounds_the_artifact() -> None:
    made = integers("llama")
    rounding = max(reference["logits"].rounding for reference in made.references.values())
    assert rounding > 1e-3
    honest = made.failed(made.target.open(made.artifact), exact=True)
    assert honest is not None  # to the limits of float32 it fails, so that these do bind
    assert honest["worst_sigma"] < 2 * rounding
