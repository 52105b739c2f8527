"""What a real conversion says of itself, and every format that can be made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from calque import pipeline
from calque.artifact import MANIFEST, REPORT, Artifact
from calque.errors import ParityFailed
from calque.passes import Rewrites
from calque.passes.transpose_linear import TransposeLinear
from calque.recipe import Recipe
from calque.traced import TracedModel
from calque.validation.cells import read_artifact
from calque.validation.render import report
from calque.weights import Derived
from tests.tiny_models import TINY, source_of

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{"model": str(source_of("gemma3_text").folder), "target": "onnxruntime", **settings})


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return pipeline.convert(recipe(), tmp_path_factory.mktemp("converted") / "gemma")


@pytest.fixture(scope="module")
def told(converted: Artifact) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((converted.folder / REPORT).read_text(encoding="utf-8"))
    return told


def test_the_report_agrees_with_the_manifest(converted: Artifact, told: dict[str, Any]) -> None:
    manifest = json.loads((converted.folder / MANIFEST).read_text(encoding="utf-8"))
    assert {key: told["source"][key] for key in ("id", "revision", "sha256")} == manifest["source"]
    assert {done["name"]: done["count"] for done in told["passes"]} == manifest["passes"]
    assert all(told[key] == manifest[key] for key in ("target", "precision", "limits"))
    assert told["sizes"].keys() - {MANIFEST} == manifest["files"].keys()
    assert (told["failures"], told["notes"]) == ([], [])


def test_the_manifest_holds_no_measurement(converted: Artifact) -> None:
    manifest = json.loads((converted.folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest.keys() & {"layers", "weights", "notes", "sizes", "stages", "failures"} == set()
    assert manifest["source"].keys() == {"id", "revision", "sha256"}


def test_what_a_pass_left_alone_is_told_with_the_reason(told: dict[str, Any]) -> None:
    [done] = [done for done in told["passes"] if done["name"] == "transpose_linear"]
    assert [why for _, why in done["skipped"]] == ["tied, or read by other operators too"]


def test_the_weights_fill_the_data_file(converted: Artifact, told: dict[str, Any]) -> None:
    stored, graph = told["sizes"]["model.onnx.data"], told["sizes"]["model.onnx"]
    # Small tensors stand in the graph itself.
    assert stored <= sum(group["bytes"] for group in told["weights"]) <= stored + graph
    assert [group["name"] for group in told["weights"]] == [
        "embeddings and head (tied)", "model.layers.0", "model.layers.1", "model.layers.2", "norm",
    ]  # fmt: skip


def test_every_layer_was_compared_on_padded_rows_with_steps(converted: Artifact, told: dict[str, Any]) -> None:
    assert [(row["layer"], row["kind"]) for row in told["layers"]] == [(state.layer, state.kind) for state in converted.states]
    assert all(row["scenario"] == "ragged-left" and 0 < row["worst_sigma"] < row["limit"] for row in told["layers"])


def test_every_format_is_made_of_it(converted: Artifact, told: dict[str, Any]) -> None:
    folders = [converted.folder]
    assert json.loads(report(folders, "json"))["artifacts"][0]["report"] == told
    cases = [case.get("name") for case in ET.fromstring(report(folders, "junit")).iter("testcase")]
    assert cases == [row["name"] for row in told["scenarios"]]
    assert report(folders, "markdown").splitlines()[0].endswith("onnxruntime, fp32: passed")
    assert "Parity by layer" in report(folders, "html")


def values_negated(weight: torch.Tensor) -> torch.Tensor:
    """A product of queries, keys and values, [in, out], whose last columns, the values, have the other sign."""
    tiny = TINY["gemma3_text"]
    kept = weight.shape[1] - tiny.kv_heads * tiny.head_dim
    return torch.cat([weight[:, :kept], -weight[:, kept:]], dim=1)


def test_a_rejected_artifact_tells_the_layer_that_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = TransposeLinear.apply

    def negate(self: TransposeLinear, model: TracedModel) -> Rewrites:
        done = apply(self, model)
        [name] = [name for name in model.weights.entries if "layers.1.self_attn" in name and name.endswith("qkv.transposed")]
        weight = model.weights[name]
        model.weights.entries[name] = Derived((weight,), "negate", values_negated, "float32", weight.shape)
        return done

    monkeypatch.setattr(TransposeLinear, "apply", negate)
    with pytest.raises(ParityFailed):
        pipeline.convert(recipe(), tmp_path / "out")
    cell = read_artifact(tmp_path / "out.rejected")
    assert cell.status == "failed"
    assert "layer 1 value" in cell.findings[0]
    worst = {(row["layer"], row["kind"]): row["worst_sigma"] for row in cell.report.layers}
    assert worst[0, "key"] < 1e-4 < worst[1, "value"]
    assert "layer 1 value" in report([tmp_path / "out.rejected"], "markdown")
