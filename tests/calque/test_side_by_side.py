"""`calque compare`: the same integers in every target, differences of answers, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import calque
from calque.artifact import Artifact, file_sha256
from calque.cli import main
from calque.errors import ArtifactUnreadable, UsageError
from calque.recipe import Recipe
from calque.side_by_side import compare, faults, groups, text

COMMON: dict[str, Any] = {"model": "builtin:quill", "parity": {"scenarios": ["single-prompt", "batch-2"]}, "dims": {"max_length": 64}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("pair")
    standard = {"operators": "standard", "activations": "int8"}
    calque.convert(Recipe(target="onnxruntime", precision="int4", **COMMON), place / "packed")
    calque.convert(Recipe(target="onnxruntime", precision="int4", options=standard, **COMMON), place / "standard")
    return [place / "packed", place / "standard"]


def test_integers_are_those_of_every_target_and_answers_are_close(pair: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, pair), "--record", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["rows_apart"] for row in found["integers"]] == [0, 0]
    assert found["integers"][0]["rows"] == found["integers"][1]["rows"] > 10_000
    exact = [row for row in found["answers"] if not row["rounded"]]
    assert exact[0]["worst_sigma"] < 1e-4, "the same integers, multiplied without rounding, give the same"
    assert found["scenarios"] == ["batch-2", "single-prompt"]
    for folder in pair:
        assert json.loads((folder / "report.json").read_text())["across"] == found
        assert Artifact.read(folder).damaged_files() == []
    assert "none" in text(found)


def test_one_integer_that_is_another_fails(pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = _copy_with_one_integer_changed(pair[0], tmp_path / "changed")
    assert main(["compare", str(pair[1]), str(changed)]) == 3
    shown = capsys.readouterr()
    assert "1 of" in shown.err
    assert "rows are not those of" in shown.err


def test_a_damaged_artifact_is_told_before_its_runtime_reads_it(pair: list[Path], tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "cut")
    file = tmp_path / "cut" / "model.onnx.data"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactUnreadable, match="is damaged") as caught:
        compare([pair[1], tmp_path / "cut"])
    assert caught.value.where == ("model.onnx.data  bytes differ from the manifest's sha256",)


def test_integers_of_8_bits_are_not_held_against_4(pair: list[Path], tmp_path: Path) -> None:
    calque.convert(Recipe(target="onnxruntime", precision="int8", **COMMON), tmp_path / "int8")
    found = compare([*pair, tmp_path / "int8"])
    assert [row["rows_apart"] for row in found["integers"]] == [0, 0, 0]
    assert found["integers"][2]["beside"] == found["integers"][2]["artifact"] == str(tmp_path / "int8")
    assert faults(found) == []


def _copy_with_one_integer_changed(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    model = onnx.load(copy / "model.onnx")
    packed = next(weight for weight in model.graph.initializer if weight.name.endswith("o_proj.weight.q.packed"))
    values = numpy_helper.to_array(packed).copy()
    values[0, 0, 0] ^= 1
    packed.CopyFrom(numpy_helper.from_array(values, packed.name))
    onnx.save(model, copy / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"] |= {name: file_sha256(copy / name) for name in ("model.onnx", "model.onnx.data")}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_what_has_nothing_in_common_is_refused(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing beside it"):
        compare(pair[:1])
    with pytest.raises(UsageError, match="named twice"):
        compare([*pair, pair[0]])
    manifest = json.loads((pair[0] / "manifest.json").read_text())
    manifest["source"]["sha256"] = "another"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="several models"):
        compare([pair[0], tmp_path])


def test_groups_are_of_one_model_and_precision_for_several_targets(pair: list[Path]) -> None:
    one = Artifact.read(pair[0])
    other = Artifact.read(pair[1])
    assert groups([one, other]) == [], "one target alone"
    from dataclasses import replace

    moved = replace(other, target="tensorrt")
    assert groups([one, moved]) == [[pair[0], pair[1]]]
    assert groups([one, replace(moved, precision="int8")]) == []


def test_integers_lie_as_the_passes_made_them(pair: list[Path]) -> None:
    from calque.targets._onnx_integers import integers

    packed, standard = (integers(folder / "model.onnx") for folder in pair)
    name = "model.layers.0.self_attn.o_proj.weight"
    for part, other in zip(packed[name], standard[name], strict=True):
        np.testing.assert_array_equal(part, other)
    assert packed[name][0].dtype == np.int8
    assert -8 <= packed[name][0].min() < 0 < packed[name][0].max() <= 7
