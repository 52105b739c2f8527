from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calque import cli
from calque.artifact import REPORT, Artifact, TensorSpec
from calque.converters import vision
from calque.errors import Unsupported, UsageError, WeightMismatch
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.runtime import open_session
from calque.source import ModelSource
from calque.traced import user_nodes
from calque.validation.images import images
from calque.validation.validate import validate
from tests.tiny_vision import CLASSIFIERS, LABELS, save_random

SCENARIOS = {"single-image", "batch-2", "batch-5", "batch-5-turned", "plain-images"}
SIDES = {"convnext": 64}


def converted(model: Path, out: Path, **settings: Any) -> Artifact:
    return convert(Recipe(model=str(model), target="onnxruntime", **settings), out)


def statuses(artifact: Artifact) -> dict[str, str]:
    return {row["name"]: row["status"] for row in json.loads((artifact.folder / REPORT).read_text())["scenarios"]}


def source_of(folder: Path) -> ModelSource:
    return ModelSource.resolve(str(folder), scratch=folder)


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=pytest.mark.slow if name == "deit" else ()) for name in CLASSIFIERS])
def test_classifier_passes_the_whole_gate(model_type: str, tmp_path: Path) -> None:
    artifact = converted(save_random(tmp_path / "model", model_type), tmp_path / "out")
    assert statuses(artifact) == dict.fromkeys(SCENARIOS, "passed")
    assert artifact.proof.numerics.worst is not None
    assert artifact.proof.numerics.worst < 1e-4
    side = SIDES.get(model_type, 28)
    graph = artifact.graphs["model"]
    assert graph.inputs == (TensorSpec("pixel_values", "float32", ("batch_size", 3, side, side)),)
    assert graph.outputs == (TensorSpec("logits", "float32", ("batch_size", LABELS)),)
    assert artifact.states == ()
    assert (artifact.folder / "preprocessor_config.json").is_file()
    assert validate(artifact.folder)["status"] == "passed"


@pytest.mark.parametrize(
    ("precision", "model_type"),
    [
        ("fp16", "vit"),
        pytest.param("fp16", "resnet", marks=pytest.mark.slow),
        ("int8", "vit"),
        pytest.param("int4", "vit", marks=pytest.mark.slow),
    ],
)
def test_narrower_weights_pass_the_gate_and_images_stay_float32(precision: str, model_type: str, tmp_path: Path) -> None:
    artifact = converted(save_random(tmp_path / "model", model_type), tmp_path / "out", precision=precision)
    assert set(statuses(artifact).values()) == {"passed"}
    assert artifact.graphs["model"].inputs[0].dtype == artifact.graphs["model"].outputs[0].dtype == "float32"
    data = json.loads((artifact.folder / REPORT).read_text())["quality"]
    assert (data["text"], data["rows"], data["tokens"]) == ("random images", 64, 0) if precision.startswith("int") else not data


def test_patches_see_each_other_through_attention_without_a_mask(tmp_path: Path) -> None:
    model = vision.trace(source_of(save_random(tmp_path)))
    attentions = user_nodes(model.graph.nodes, torch.ops.calque.attention.default)
    assert [node.args[3] for node in attentions] == [None, None]
    assert [node.args[7] for node in attentions] == [False, False]


def test_artifact_gives_the_labels_of_the_untouched_model_whatever_the_batch(tmp_path: Path) -> None:
    source = source_of(save_random(tmp_path / "model", "resnet"))
    artifact = converted(tmp_path / "model", tmp_path / "out")
    pixels = images(range(4, 11), artifact.graphs["model"].inputs[0])
    with torch.no_grad():
        expected = source.load_eager()(torch.from_numpy(pixels)).logits.numpy()
    given = np.asarray(open_session(artifact.folder)("model", {"pixel_values": pixels})["logits"], dtype=np.float32)
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_statistics_of_batch_norms_are_in_the_ledger(tmp_path: Path) -> None:
    weights = vision.trace(source_of(save_random(tmp_path, "resnet"))).weights
    statistics = [name for name in weights.entries if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert set(statistics) <= set(weights.required)
    weights.check()


def test_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = save_random(tmp_path / "model") / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "classifier" not in name}, file, {"format": "pt"})
    with pytest.raises(WeightMismatch, match=r"classifier\.weight"):
        converted(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "size"),
    [
        ({"size": 224}, (224, 224)),
        ({"size": {"height": 224, "width": 192}}, (224, 192)),
        ({"size": {"shortest_edge": 224}}, (224, 224)),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, (224, 224)),
        ({"size": [346, 346], "crop_size": 289, "do_center_crop": False}, (346, 346)),
        ({"size": {"longest_edge": 512}}, None),
        ({"size": {"height": 0, "width": "wide"}}, None),
        ({"crop_size": True}, None),
        ({}, None),
    ],
)
def test_size_that_a_preprocessor_leaves(table: dict[str, Any], size: tuple[int, int] | None) -> None:
    assert vision.preprocessed_size(table) == size


def traced_shape(folder: Path) -> tuple[int | str, ...]:
    return vision.trace(source_of(folder)).inputs[0].shape


def test_images_are_as_the_preprocessor_leaves_them_where_the_model_takes_that(tmp_path: Path) -> None:
    sides = {"size": {"height": 42, "width": 35}}
    assert traced_shape(save_random(tmp_path / "dinov2", "dinov2", sides)) == ("batch_size", 3, 42, 35)
    assert traced_shape(save_random(tmp_path / "vit", "vit", sides)) == ("batch_size", 3, 28, 28)


def test_sides_and_channels_may_be_any(tmp_path: Path) -> None:
    folder = save_random(tmp_path, "vit", image_size=[28, 14], num_channels=1, preprocessor={"do_resize": False})
    assert traced_shape(folder) == ("batch_size", 1, 28, 14)


def test_model_whose_images_nobody_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="does not say how large its images are") as caught:
        traced_shape(save_random(tmp_path, "resnet", {"do_resize": True}))
    assert "preprocessor_config.json" in str(caught.value)


def test_images_too_small_for_the_model_are_refused_with_what_its_code_says(tmp_path: Path) -> None:
    small = {"size": {"height": 8, "width": 8}}
    with pytest.raises(Unsupported, match="8 x 8"):
        traced_shape(save_random(tmp_path, "convnext", small, image_size=8))


@pytest.mark.parametrize("named", ["parity.text", "dims.max_length", "logits"])
def test_settings_of_models_that_read_text_are_refused(named: str, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("Words.")
    settings: dict[str, dict[str, Any]] = {
        "parity.text": {"parity": {"text": str(text)}},
        "dims.max_length": {"dims": {"max_length": 64}},
        "logits": {"logits": "last"},
    }
    with pytest.raises(UsageError, match="reads images") as caught:
        converted(save_random(tmp_path / "model"), tmp_path / "out", **settings[named])
    assert caught.value.where == (named,)


def test_commands_know_an_artifact_that_reads_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["convert", str(save_random(tmp_path / "model")), "--target", "onnxruntime", "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert cli.main(["inspect", out]) == 0
    said = capsys.readouterr().out
    assert "in   pixel_values  float32 [batch_size, 3, 28, 28]" in said
    assert "limits   images of one size, any number of them at once" in said
    assert cli.main(["bench", out, "--rounds", "1", "--prompt-tokens", "1", "--batch-size", "2"]) == 0
    assert "texts/s" in capsys.readouterr().out
    assert cli.main(["generate", out, "-p", "x"]) == 4
    assert "continues no text" in capsys.readouterr().err


def test_validating_images_needs_no_torch(tmp_path: Path) -> None:
    artifact = converted(save_random(tmp_path / "model"), tmp_path / "out")
    code = (
        "import sys; from pathlib import Path; from calque.validation.validate import validate;"
        "assert validate(Path(sys.argv[1]))['status'] == 'passed'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(artifact.folder)], check=True)
