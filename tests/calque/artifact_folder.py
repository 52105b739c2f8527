"""Folders that look like artifacts, for tests of what happens around them."""

from __future__ import annotations

import json
from pathlib import Path

from calque.artifact import Artifact, Check, GraphSpec, Limits, Proof, TensorSpec, file_sha256
from calque.states import key_value_states

MANIFEST = {"schema": 1, "target": "onnxruntime", "recipe": {}, "files": {"model.onnx": ""}}


def write_artifact(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "model.onnx").write_text(content)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))


def content(folder: Path) -> str:
    return (folder / "model.onnx").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


PASSED = Proof(Check("passed", "onnxruntime", worst=2e-5), Check("passed", "onnxruntime"), Check("passed", "onnxruntime"))
ROW = {
    "name": "single", "rows": 1, "positions": 40, "worst_sigma": 1.2e-5, "mean_sigma": 2e-6, "limit": 1e-4,
    "top1_agree": 1.0, "near_ties": [], "status": "passed", "reason": None, "seconds": 0.5,
}  # fmt: skip
REPORT = {"scenarios": [ROW], "stages": [{"name": "trace", "seconds": 3.21, "peak_rss_bytes": 512_000_000}], "sizes": {}}


def write_proved_artifact(folder: Path, proof: Proof = PASSED) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "report.json").write_text(json.dumps(REPORT))
    key, value = key_value_states(0, 2, 64, 64, None)
    key1, value1 = key_value_states(1, 2, 64, 64, None)
    ids = TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))
    past = TensorSpec(key.input, "float32", key.shape)
    artifact = Artifact(
        folder=folder,
        target="onnxruntime",
        recipe={"schema": 1, "model": "builtin:quill"},
        source={"id": "builtin:quill", "revision": None, "sha256": "0123"},
        precision="fp32",
        files={"model.onnx": file_sha256(folder / "model.onnx")},
        graphs={"model": GraphSpec("model.onnx", (ids, past), (TensorSpec("logits", "float32", ("batch_size", "sequence_length", 100)),))},
        states=(key, value, key1, value1),
        passes={"cache_dynamic": 4},
        tools={"torch": "2.13.0"},
        limits=Limits(),
        proof=proof,
    )
    artifact.write_manifest()
    return artifact
