"""Engines of real models, built on the CPU by TensorRT-RTX, of files that passed the whole gate; nothing of it needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from calque import passes
from calque.artifact import Artifact
from calque.conversion import Conversion, resolve
from calque.pipeline import convert
from calque.recipe import Calibration, Dims, Recipe
from calque.targets.tensorrt import TensorRT
from calque.validation.report import Report
from tests.tiny_encoders import save_encoder, save_pooling
from tests.tiny_models import TYPES, save_random
from tests.tiny_vision import save_random as save_images

pytest.importorskip("tensorrt_rtx", reason="it builds the engines: pip install 'calque[tensorrt-rtx]'")

SLOTS = 40
QUILL = "builtin:quill"


def save_minilm(folder: Path) -> Path:
    """A sentence encoder as all-MiniLM is one: BERT, its mean, of length 1."""
    return save_pooling(save_encoder(folder, "bert"), "Pooling", "Normalize", pooling_mode_mean_tokens=True)


SAVE: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: save_random(TYPES[name], folder) for name in ("llama", "qwen3", "gemma3_text", "phi3", "gpt2")},  # type: ignore[misc]
    "minilm": save_minilm,
    "vit": save_images,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where each model is."""
    folder = tmp_path_factory.mktemp("models")
    return {QUILL: QUILL, **{name: str(save(folder / name)) for name, save in SAVE.items()}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text to measure ranges on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The function returns the number of rows that were read, and raises where there is none.\n" * 20, encoding="utf-8")
    return str(file)


def recipe(model: str, precision: str = "fp16", **settings: Any) -> Recipe:
    dims = Dims() if model.endswith(("minilm", "vit")) else Dims(max_length=SLOTS)
    return Recipe(model=model, target="tensorrt", precision=precision, dims=dims, require="build", **settings)  # type: ignore[arg-type]


def built(model: str, folder: Path, precision: str = "fp16", **settings: Any) -> Artifact:
    """The artifact of one conversion, its engine beside it."""
    artifact = convert(recipe(model, precision, **settings), folder / "out")
    assert (artifact.proof.numerics.status, artifact.proof.build.status) == ("passed", "passed")
    assert artifact.proof.build.by == "tensorrt-rtx"
    assert artifact.tools["tensorrt-rtx"].startswith("1.")
    assert (artifact.folder / "model.plan").is_file()
    assert {row["status"] for row in Report.read(artifact.folder).scenarios} == {"passed"}
    return artifact


CODES = ("int8", "int4", "fp8")
# What goes through the whole gate quickly: one of each kind of model. Slow tests ask it of all, in all.
QUICK = ("llama", "minilm", "vit", QUILL)
GATED = [
    pytest.param(name, precision, marks=() if name in QUICK and precision == "fp16" else pytest.mark.slow)
    for name in (*SAVE, QUILL)
    for precision in ("fp16", *CODES)
]


@pytest.mark.parametrize(("name", "precision"), GATED)
def test_an_engine_is_built_of_what_the_gate_proved(name: str, precision: str, sources: dict[str, str], tmp_path: Path) -> None:
    artifact = built(sources[name], tmp_path, precision)
    measured = Report.read(artifact.folder).build
    assert measured["plan_bytes"] == (artifact.folder / "model.plan").stat().st_size
    assert min(measured["build_seconds"], measured["peak_rss_bytes"]) > 0
    if artifact.states:
        assert measured["aliases"] == {state.output: state.input for state in artifact.states}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*SAVE, QUILL)])
def test_an_engine_is_built_in_each_precision(name: str, sources: dict[str, str], tmp_path: Path) -> None:
    """Traced once for all of them, and not through the gate."""
    traced = Conversion(recipe(sources[name]), TensorRT(), resolve(recipe(sources[name]), tmp_path)).trace()
    plans = {}
    for precision in ("fp16", *CODES):
        model, target, folder = traced.copy(), TensorRT(), tmp_path / precision
        folder.mkdir()
        done = passes.run_all(target.passes(precision), model)
        assert target.problems(model) == []
        emitted = target.emit(target.lower(model), model, folder)
        counts = {name: rewrites.count for name, rewrites in done.items()}
        asked = recipe(sources[name], precision).as_manifest()
        artifact = Artifact(folder, "tensorrt", asked, {}, precision, {}, emitted.graphs, model.states, counts, {}, emitted.limits)
        target.finish(artifact, PreTrainedConfig())
        artifact.write_manifest()
        plans[precision] = target.build(artifact, lambda: traced, None)
    assert {precision: plan.build.status for precision, plan in plans.items()} == dict.fromkeys(("fp16", *CODES), "passed")


@pytest.mark.parametrize("precision", [pytest.param("int8-static", marks=pytest.mark.slow), "fp8"])
def test_activations_are_rounded_to_ranges_of_a_text(precision: str, text: str, tmp_path: Path) -> None:
    artifact = built(QUILL, tmp_path, precision, calibration=Calibration(text=text))
    assert artifact.passes["quantize_activations"] > 10
    names = {row["name"] for row in Report.read(artifact.folder).scenarios}
    assert {"decode-16", "decode-16, activations exact"} <= names


def test_tensorrts_own_attention_is_told_its_lengths(sources: dict[str, str], tmp_path: Path) -> None:
    artifact = built(sources["qwen3"], tmp_path, options={"attention": "trt"})
    assert Report.read(artifact.folder).build["onnx"] == "model.trt.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wider_types_build(precision: str, sources: dict[str, str], tmp_path: Path) -> None:
    built(sources["gemma3_text"], tmp_path, precision)
