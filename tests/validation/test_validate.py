from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calque.artifact import Artifact, Limits, file_sha256
from calque.errors import ArtifactUnreadable
from calque.validation.drive import ModelIO
from calque.validation.reference import store_reference
from calque.validation.scenarios import build
from calque.validation.validate import validate
from tests.runtime.counting import SIZE, write_counting


class Counter(torch.nn.Module):
    """What the counting artifact computes, without a cache: σ is that of one-hot rows."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> dict[str, torch.Tensor]:
        table = torch.from_numpy(np.roll(np.eye(SIZE, dtype=np.float32), 1, axis=1))

        return {"logits": table[input_ids]}


@pytest.fixture
def proven(tmp_path: Path) -> Artifact:
    limits = Limits(max_length=64)
    artifact = write_counting(tmp_path)
    _without_bonus(tmp_path)
    (tmp_path / "scratch").mkdir()
    store_reference(Counter, build(limits, SIZE), ModelIO.of(artifact), tmp_path, tmp_path / "scratch")
    names = ["model.onnx", *(f"reference/{path.name}" for path in sorted((tmp_path / "reference").glob("*.npz")))]
    artifact = replace(artifact, limits=limits, files={name: file_sha256(tmp_path / name) for name in names})
    artifact.write_manifest()
    return artifact


def _without_bonus(folder: Path) -> None:
    """The artifact's logits do not depend on how full the cache is."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(0.0, np.float32), "weight"))
    onnx.save(model, folder / "model.onnx")


def test_a_whole_artifact_passes_with_onnxruntime_alone(proven: Artifact) -> None:
    found = validate(proven.folder, threads=1)
    assert found["status"] == "passed"
    assert found["failures"] == []
    by_name = {row["name"]: row for row in found["scenarios"]}
    assert by_name["past-full-length"]["reason"].startswith("refused: ")
    assert by_name["full-length"]["positions"] == 64
    assert max(row["worst_sigma"] or 0.0 for row in found["scenarios"]) == 0.0


def test_a_changed_file_fails_before_anything_runs(proven: Artifact) -> None:
    path = proven.folder / "reference" / "ragged-left.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactUnreadable, match="is damaged") as caught:
        validate(proven.folder)
    assert caught.value.where == ("reference/ragged-left.npz  bytes differ from the manifest's sha256",)


def test_an_artifact_that_computes_something_else_fails(proven: Artifact) -> None:
    write_counting(proven.folder)
    replace(proven, files={}).write_manifest()
    found = validate(proven.folder)
    assert found["status"] == "failed"
    assert any(line.startswith("single-prompt: row 0, position ") for line in found["failures"])


def test_an_artifact_without_references_cannot_be_validated(tmp_path: Path) -> None:
    write_counting(tmp_path)
    with pytest.raises(ArtifactUnreadable, match="no reference"):
        validate(tmp_path)
