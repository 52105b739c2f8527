from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from calque import passes
from calque.artifact import Limits, TensorSpec
from calque.errors import Unsupported
from calque.ops import decompose_attention
from calque.passes.cache_dynamic import CacheDynamic
from calque.targets import _to_onnx
from calque.targets._standard import STANDARD
from calque.traced import TracedModel, user_nodes
from calque.weights import WeightTable
from tests.tiny_models import traced

# torch's own decomposition copies a deprecated class.
HEADS, KV_HEADS, SIZE, VALUE_SIZE = 4, 2, 8, 6


class Attend(nn.Module):
    """One attention alone."""

    def __init__(self, softcap: float, masked: bool, sinks: Tensor | None) -> None:
        super().__init__()
        self.softcap, self.masked, self.sinks = softcap, masked, sinks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = torch.ops.calque.attention(q, k, v, mask if self.masked else None, 0.7, self.softcap, self.sinks, not self.masked)
        return out


def draw(batch: int, queries: int, keys: int, value_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + queries)
    q, k, v = (
        torch.randn(batch, heads, length, size, generator=generator)
        for heads, length, size in ((HEADS, queries, SIZE), (KV_HEADS, keys, SIZE), (KV_HEADS, keys, value_size))
    )
    mask = torch.rand(batch, 1, queries, keys, generator=generator) < 0.5
    mask[..., -1] = True
    return q, k, v, mask


def exported(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any, names: tuple[str, ...], rank: int) -> TracedModel:
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)
    specs = tuple(TensorSpec(name, str(x.dtype).removeprefix("torch."), ("batch",) * x.ndim) for name, x in zip(names, inputs, strict=True))
    specs = tuple(TensorSpec(s.name, s.dtype, tuple(f"{s.name}_{i}" for i in range(len(s.shape)))) for s in specs)
    output = TensorSpec("out", "float32", tuple(f"out_{i}" for i in range(rank)))
    return TracedModel(program, WeightTable({}), (), specs, (output,), Limits(), settled=True)


def session(model: TracedModel, folder: Path) -> ort.InferenceSession:
    ir.save(_to_onnx.to_onnx(model), folder / "model.onnx")
    return ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("softcap", [0.0, 1.5], ids=["uncapped", "capped"])
@pytest.mark.parametrize("value_size", [SIZE, VALUE_SIZE])
def test_attention_equals_the_reference(softcap: float, sinks: Tensor | None, value_size: int, tmp_path: Path) -> None:
    Dim = torch.export.Dim
    batch, queries, keys = Dim("batch"), Dim("queries"), Dim("keys")
    shapes = ({0: batch, 2: queries}, {0: batch, 2: keys}, {0: batch, 2: keys}, {0: batch, 2: queries, 3: keys})
    model = exported(Attend(softcap, True, sinks), draw(2, 3, 7, value_size), shapes, ("q", "k", "v", "mask"), 4)
    runs = session(model, tmp_path)
    for size in ((2, 3, 7), (1, 1, 9), (3, 5, 5)):
        q, k, v, mask = draw(*size, value_size)
        (out,) = runs.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "mask": mask.numpy()})
        expected = decompose_attention(q, k, v, mask, 0.7, softcap, sinks, True)
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-5, atol=1e-5)


class Unspeakable(nn.Module):
    """Calls what has a meaning here and no word in ONNX."""

    def forward(self, past: Tensor, new: Tensor) -> Tensor:
        out: Tensor = torch.ops.calque.cache_update(past, new, "0.key")
        return out * 2


class Around(nn.Module):
    """Gives the operator a module to stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Unspeakable()

    def forward(self, past: Tensor, new: Tensor) -> Tensor:
        out: Tensor = self.inner(past, new)
        return out


def test_operator_without_a_translation_is_a_problem_with_module_and_source_line() -> None:
    inputs = (torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 1, 3))
    model = exported(Around(), inputs, None, ("past", "new"), 4)
    (problem,) = _to_onnx.problems(model, STANDARD)
    assert problem.node == "cache_update"
    assert problem.module == "inner"
    assert Path(__file__).name in problem.source
    assert "line " in problem.source
    assert problem.why == "calque.cache_update.default has no ONNX translation"
    assert str(problem) == f"cache_update: {problem.why} (inner {problem.source})"
    assert problem.fix == "add the pass cache_dynamic or cache_static, which settle states"


def test_every_unsettled_state_is_a_problem_and_none_is_left_by_a_cache_pass() -> None:
    model = traced("llama")
    found = _to_onnx.problems(model, STANDARD)
    assert len(found) == 4
    assert {problem.module for problem in found} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    passes.run([CacheDynamic()], model)
    assert _to_onnx.problems(model, STANDARD) == []


class Promoting(nn.Module):
    """Adds an integer to a float, which torch promotes and ONNX does not."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.silu(x + y) / 3


def test_types_are_promoted_where_operators_mix_them(tmp_path: Path) -> None:
    x, y = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)), torch.arange(6).reshape(2, 3)
    model = exported(Promoting(), (x, y), None, ("x", "y"), 2)
    (out,) = session(model, tmp_path).run(None, {"x": x.numpy(), "y": y.numpy()})
    np.testing.assert_allclose(out, Promoting()(x, y).numpy(), rtol=1e-6)


class Decomposed(nn.Module):
    """Uses an operator that has a decomposition and no direct translation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.nan_to_num(torch.ops.aten.square(x))  # type: ignore[no-any-return]


def test_operator_without_a_translation_is_decomposed_where_it_can_be(tmp_path: Path) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    model = exported(Decomposed(), (x,), None, ("x",), 2)
    assert _to_onnx.untranslated(model.program, STANDARD)
    assert _to_onnx.problems(model, STANDARD) == []
    (out,) = session(model, tmp_path).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(out, Decomposed()(x).numpy(), rtol=1e-5)


class Untranslatable(nn.Module):
    """Uses an operator that neither torch.onnx nor a decomposition has a word for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(x, x)


def test_failed_translation_names_the_node_and_its_source_line() -> None:
    model = exported(Untranslatable(), (torch.ones(2, 3),), None, ("x",), 2)
    with pytest.raises(Unsupported) as caught:
        _to_onnx.to_onnx(model)
    assert caught.value.where[0].startswith("hypot (aten.hypot.default) in ")
    assert Path(__file__).name in caught.value.where[0]


def test_operator_that_will_fail_is_a_problem_before_any_lowering() -> None:
    model = exported(Untranslatable(), (torch.ones(2, 3),), None, ("x",), 2)
    assert [problem.node for problem in _to_onnx.problems(model, STANDARD)] == ["hypot"]


def test_sinks_of_a_whole_model_are_written_out_and_plain_attention_is_one_operator() -> None:
    histograms = {}
    for name in ("gpt_oss", "llama"):
        model = traced(name)
        passes.run([CacheDynamic()], model)
        attentions = user_nodes(model.graph.nodes, torch.ops.calque.attention.default)
        assert len(attentions) == 2
        histograms[name] = [node.op_type for node in _to_onnx.to_onnx(model).graph]
    assert histograms["llama"].count("Attention") == 2
    assert "Attention" not in histograms["gpt_oss"]


def test_program_is_left_as_it_was_after_lowering() -> None:
    model = traced("llama")
    passes.run([CacheDynamic()], model)
    code = str(model.graph)
    _to_onnx.to_onnx(model)
    assert str(model.graph) == code
    assert "run_decompositions" not in vars(model.program)
