"""Lines of TorchScript for every kind of node; files whose weights are once; emitters that are broken in the known ways are caught."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calque
from calque import passes
from calque.artifact import Artifact, Limits, TensorSpec
from calque.errors import ArtifactUnreadable, ParityFailed, UsageError
from calque.recipe import Parity, Recipe
from calque.runtime.torchscript_session import ExactSession, TorchScriptSession, quiet
from calque.targets import _torchscript, _torchscript_check, _torchscript_file
from calque.targets._torchscript import Writer
from calque.targets.torchscript import FILE, TorchScript
from calque.traced import TracedModel
from calque.weights import WeightTable
from tests.tiny_models import TYPES, answers, prompt, save_random, traced

# Shown by others: windows and experts by the mobile target, caps and other masks by Core ML and `test_aten`.
SHOWN = ("mixtral", "gemma3_text", "bloom")
LENGTH = torch.export.Dim("length", min=2, max=64)


def exported(module: nn.Module, *inputs: Tensor) -> TracedModel:
    """A model of one module whose first axis is of any length."""
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=tuple({0: LENGTH} for _ in inputs), strict=False)
    specs = tuple(TensorSpec(f"x{at}", str(x.dtype).removeprefix("torch."), ("length", *x.shape[1:])) for at, x in enumerate(inputs))
    return TracedModel(program, WeightTable({}), (), specs, (TensorSpec("out", "float32", ("length",)),), Limits(), settled=True)


def scripted(model: TracedModel) -> Any:
    target = TorchScript()
    assert target.problems(model) == []
    return _torchscript_file.module(target.lower(model), model)


class Sizes(nn.Module):
    """Arithmetic on sizes: integers, floats, the larger of two, powers."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[0]
        share, most, least = 1.0 / size, torch.sym_max(size, 5), torch.sym_min(size, 5)  # type: ignore[no-untyped-call]
        return x.sum(1) * share + torch.full((size,), most * 10.0 - least) + math.ceil(size / 2) + (size**2) % 7 + size // 2


class Parts(nn.Module):
    """Operators with several results, of which some are not read; lists with holes; literals of every kind."""

    def forward(self, x: Tensor) -> Tensor:
        _, second, _ = torch.split(x, 2, dim=1)
        best, _ = torch.topk(second, 1, dim=-1, largest=False)
        (alone,) = torch.split(best, 1, dim=1)
        picked = x[:, torch.tensor([0, 3, 3])]
        hidden = picked.masked_fill(picked > 0.5, float("-inf")).exp().clamp(None, 2)
        low = torch.where(torch.isinf(hidden), float("nan"), hidden.to(torch.float64)).nan_to_num(3.0)
        std = torch.var_mean(x, [1], correction=0, keepdim=True)[0]
        return (alone + low.sum(-1, keepdim=True).float() + std + (x[:, :1] > 0).__and__(x[:, 1:2] > 0)).squeeze(-1) * torch.tensor(2)


class Scores(nn.Module):
    """A view of what attention gives, whose numbers lie as its kernel likes."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(1, x.shape[0], 2, 3).transpose(1, 2)
        out: Tensor = nn.functional.scaled_dot_product_attention(heads, heads, heads, scale=0.3)
        return out.transpose(1, 2).reshape(x.shape[0], 6).sum(-1)


@pytest.mark.parametrize("module", [Sizes(), Parts(), Scores()], ids=lambda module: type(module).__name__)
def test_lines_give_what_the_module_gives_at_other_lengths(module: nn.Module) -> None:
    made = scripted(exported(module, torch.randn(4, 6, generator=torch.Generator().manual_seed(1))))
    for length in (2, 4, 9):
        x = torch.randn(length, 6, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(made(x), module(x))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)).sum(-1)
        return made


class Strides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x) + torch.as_strided(x, (x.shape[0],), (6,))
        return made


def test_every_node_without_a_line_is_told_with_module_and_source_before_weights_are_read() -> None:
    found = TorchScript().problems(exported(Strides(), torch.ones(4, 6)))
    whys = {problem.why.split(" ")[0]: problem for problem in found}
    assert {"cond", "aten.as_strided.default"} <= whys.keys()
    assert "a graph inside the graph" in whys["cond"].why
    assert whys["aten.as_strided.default"].fix
    assert Path(__file__).name in whys["aten.as_strided.default"].source


def test_a_line_that_torchscript_refuses_is_told_by_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported(Scores(), torch.ones(4, 6))
    written = TorchScript().lower(model)
    at = next(at for at, node in enumerate(written.origins) if "scaled_dot" in str(node.target))
    written.lines[at] = written.lines[at].replace("scale=0.3", "scaled=0.3")
    (problem,) = _torchscript_check.problems(written)
    assert problem.node == written.origins[at].name
    assert Path(__file__).name in problem.source


def emitted(name: str, precision: str, folder: Path, **options: Any) -> tuple[TracedModel, Artifact]:
    model = traced(name)
    target = TorchScript(**options)
    done = passes.run(target.passes(precision), model)
    assert target.problems(model) == []
    written = target.emit(target.lower(model), model, folder)
    return model, Artifact(folder, "torchscript", {}, {}, precision, {}, written.graphs, model.states, done, {}, written.limits)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SHOWN), "phi3-longrope"])
def test_the_file_gives_what_the_graph_gives(name: str, tmp_path: Path) -> None:
    model, artifact = emitted(name, "fp32", tmp_path)
    session = TorchScriptSession(artifact)
    for length in (5, 9):
        inputs = prompt(model, length)
        expected = answers(model, inputs)
        for key, value in session("model", inputs).items():
            np.testing.assert_allclose(np.asarray(value, np.float32), expected[key], atol=1e-4)


@pytest.mark.parametrize("activations", ["dynamic", "float32"])
def test_integers_are_stored_as_they_are_and_once(activations: str, tmp_path: Path) -> None:
    model, artifact = emitted("gpt2", "int8", tmp_path, activations=activations)  # its head is its table
    weights = model.weights.nbytes()
    assert weights < (tmp_path / FILE).stat().st_size < weights + 60_000
    inputs = prompt(model, 7)
    found = TorchScriptSession(artifact)("model", inputs)["logits"]
    np.testing.assert_allclose(np.asarray(found, np.float32), answers(model, inputs)["logits"], atol=0.3)
    if activations == "dynamic":
        held = _torchscript_file.integers(artifact)
        assert len(held) == 9
        for name, (q, scale) in held.items():
            laid = model.weights[f"{name}.q.transposed"].read()
            assert torch.equal(q, laid.t())
            assert torch.equal(scale, model.weights[f"{name}.scale.each"].read()[:, None])


def test_the_same_file_is_run_without_rounding(tmp_path: Path) -> None:
    plain, _ = emitted("gpt2", "int8", tmp_path, activations="float32")
    model, artifact = emitted("gpt2", "int8", tmp_path)
    inputs = prompt(model, 7)
    expected = answers(plain, inputs)["logits"]
    exact, rounded = (np.asarray(run(artifact)("model", inputs)["logits"], np.float32) for run in (ExactSession, TorchScriptSession))
    np.testing.assert_allclose(exact, expected, atol=1e-4)
    assert float(np.abs(rounded - expected).max()) > 1e-2


def test_tied_weights_are_in_the_file_once_and_two_conversions_are_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for _ in range(2):
        model, _ = emitted("gpt2", "fp32", tmp_path)
        assert (tmp_path / FILE).stat().st_size < model.weights.nbytes() + 60_000
        digests.add(hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_engine_of_quantized_operators_is_given_back(tmp_path: Path) -> None:
    before = torch.backends.quantized.engine
    emitted("llama", "int8", tmp_path)
    assert torch.backends.quantized.engine == before


def test_an_option_that_does_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="activations"):
        TorchScript(activations="float32").passes("fp32")


def test_a_truncated_file_is_told_as_one_that_cannot_be_read(tmp_path: Path) -> None:
    model, artifact = emitted("llama", "fp32", tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactUnreadable, match="TorchScript refuses"):
        TorchScriptSession(artifact)("model", prompt(model))


def baked(written: Writer) -> Writer:
    """Sizes as they were when the model was traced, which is what a trace by torch.jit leaves of them."""
    for at, node in enumerate(written.origins):
        if node.target is torch.ops.aten.sym_size.int:
            written.lines[at] = re.sub(r"= .*", f"= {node.meta['val'].node.hint}", written.lines[at])
    return written


def specialised(written: Writer) -> Writer:
    """Attention without its mask, causal from the upper left: what is traced of a model that was given none and has no past."""
    for at, node in enumerate(written.origins):
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            q, k, v, *_ = (written.value(value) for value in node.args)
            scale = f", scale={node.kwargs['scale']}"
            called = written.lines[at].split(" = ")[0]
            written.lines[at] = f"{called} = torch.ops.aten.scaled_dot_product_attention({q}, {k}, {v}, None, 0.0, True{scale})"
    return written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_random(TYPES["llama"], tmp_path / "model")


@pytest.mark.parametrize("breaking", [baked, specialised])
def test_an_emitter_that_specialises_is_caught_by_the_gate(
    breaking: Callable[[Writer], Writer], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = _torchscript.write
    monkeypatch.setattr(_torchscript, "write", lambda *given: breaking(write(*given)))
    recipe = Recipe(model=str(folder), target="torchscript", precision="fp32", parity=Parity(scenarios=("single-prompt", "ragged-left")))
    with pytest.raises(ParityFailed) as caught:
        calque.convert(recipe, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_the_whole_pipeline_proves_it(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(folder), target="torchscript", precision="fp32", parity=Parity(scenarios=("single-prompt", "ragged-left")))
    artifact = calque.convert(recipe, tmp_path / "out")
    assert artifact.proof.numerics.status == artifact.proof.execution.status == "passed"
    with quiet():
        loaded: Any = torch.jit.load(str(tmp_path / "out" / FILE))  # type: ignore[no-untyped-call]
    assert [argument.name for argument in loaded.forward.schema.arguments[1:4]] == ["input_ids", "attention_mask", "position_ids"]


def test_integers_of_which_every_layer_was_kept_are_proved_as_floats(folder: Path, tmp_path: Path) -> None:
    parity = Parity(scenarios=("single-prompt",))
    options = {"quantize_weights.overrides.*": "keep"}
    recipe = Recipe(model=str(folder), target="torchscript", precision="int8", options=options, parity=parity)
    artifact = calque.convert(recipe, tmp_path / "out")
    assert artifact.passes["quantize_weights"] == 0
    assert artifact.proof.numerics.status == "passed"
