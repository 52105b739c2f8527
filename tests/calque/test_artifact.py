from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from calque.artifact import MANIFEST, Artifact, Check, GraphSpec, Limits, Proof, TensorSpec, file_sha256
from calque.errors import ArtifactUnreadable, ParityFailed
from calque.states import key_value_states


def artifact_in(folder: Path, order: int = 1) -> Artifact:
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "tokenizer.json").write_text("{}")
    names = ["model.onnx", "tokenizer.json"][::order]
    return Artifact(
        folder=folder,
        target="onnxruntime",
        recipe={"model": "org/name", "passes": None},
        source={"id": "org/name", "revision": "abc", "sha256": "0" * 64},
        precision="fp32",
        files={name: file_sha256(folder / name) for name in names},
        graphs={
            "model": GraphSpec(
                "model.onnx",
                (TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),),
                (TensorSpec("logits", "float32", ("batch_size", "sequence_length", 7)),),
            )
        },
        states=key_value_states(3, 2, 8, 6, window=16),
        passes={"cache_dynamic": 2},
        tools={name: "1" for name in ["torch", "onnx"][::order]},
        limits=Limits(padding="right", batched_chunk=False, max_length=64, recompute_at=32),
        proof=Proof(Check("passed", "onnxruntime", worst=2e-06), Check("passed", "onnxruntime"), Check("not_run", reason="no GPU")),
    )


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    artifact = artifact_in(tmp_path)
    artifact.write_manifest()
    assert Artifact.read(tmp_path) == artifact
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "model.onnx", "tokenizer.json"]


def test_bytes_do_not_depend_on_the_folder_or_on_insertion_order(tmp_path: Path) -> None:
    contents = []
    for name, order in (("one", 1), ("two", -1)):
        folder = tmp_path / name
        folder.mkdir()
        artifact_in(folder, order).write_manifest()
        contents.append((folder / MANIFEST).read_bytes())
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]


def test_manifest_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    manifest = artifact_in(tmp_path).manifest()
    assert list(manifest) == [
        "schema", "target", "recipe", "source", "precision", "files", "graphs", "states", "passes", "tools", "limits", "proof",
    ]  # fmt: skip
    assert manifest["schema"] == 1
    assert manifest["graphs"]["model"]["inputs"] == ({"name": "input_ids", "dtype": "int64", "shape": ("batch_size", "sequence_length")},)
    assert manifest["proof"]["execution"] == {"status": "not_run", "by": None, "reason": "no GPU", "worst": None}


def test_proof_can_be_replaced(tmp_path: Path) -> None:
    failed = Proof(Check("failed", "onnxruntime"))
    assert artifact_in(tmp_path).with_proof(failed).proof is failed


def test_whole_folder_has_no_damaged_files(tmp_path: Path) -> None:
    assert artifact_in(tmp_path).damaged_files() == []


def test_every_damaged_or_missing_file_is_listed(tmp_path: Path) -> None:
    artifact = artifact_in(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"grapH")
    (tmp_path / "tokenizer.json").unlink()
    assert artifact.damaged_files() == ["model.onnx  bytes differ from the manifest's sha256", "tokenizer.json  missing"]


def edited(folder: Path, **changes: Any) -> None:
    artifact_in(folder).write_manifest()
    data = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(data))


def test_newer_schema_is_refused_before_anything_else_is_read(tmp_path: Path) -> None:
    edited(tmp_path, schema=2, graphs="not what it was")
    with pytest.raises(ArtifactUnreadable) as caught:
        Artifact.read(tmp_path)
    path = tmp_path / MANIFEST
    assert str(caught.value) == f"ArtifactUnreadable: {path} has schema 2, this Calque reads 1\nFix: upgrade calque"


def test_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactUnreadable, match=r"is not an artifact: it has no manifest\.json"):
        Artifact.read(tmp_path)


def test_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, said in (("none", "none does not exist"), ("file", "file is not a folder"), ("x" * 400, "x does not exist")):
        with pytest.raises(ArtifactUnreadable, match=said):
            Artifact.read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("\ud800", "it is not JSON"),
        ("[]", "it holds no JSON object"),
        ("null", "it holds no JSON object"),
        ("{}", "it does not say what `schema` it follows"),
        ('{"target": "onnxruntime"}', "it does not say what `schema` it follows"),
    ],
)
def test_manifest_that_is_no_manifest_is_reported(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtifactUnreadable, match=rf"manifest\.json cannot be read: {said}"):
        Artifact.read(tmp_path)


def test_manifest_that_lacks_a_key_names_it(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"schema": 1}')
    with pytest.raises(ArtifactUnreadable, match="does not follow schema 1: 'recipe' is missing"):
        Artifact.read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": 5},
        {"graphs": []},
        {"limits": {"padding": "any", "more": 1}},
        {"states": [{}]},
        {"proof": {}},
        {"graphs": {"model": {"file": "x"}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_manifest_that_does_not_follow_the_schema_is_reported(changes: dict[str, Any], tmp_path: Path) -> None:
    edited(tmp_path, **changes)
    with pytest.raises(ArtifactUnreadable, match="does not follow schema 1"):
        Artifact.read(tmp_path)


def test_proof_without_failures_is_quiet() -> None:
    Proof(Check("passed"), Check("not_run"), Check("not_run")).raise_if_failed()


def test_failed_proof_says_which_checks_and_lists_every_failure() -> None:
    proof = Proof(Check("failed"), Check("passed"), Check("failed"), failures=("first diverges at stage 'trace'", "batch-2: 3 σ"))
    with pytest.raises(ParityFailed) as caught:
        proof.raise_if_failed()
    assert caught.value.what == "numerics, execution failed: the artifact does not agree with the eager model"
    assert caught.value.where == proof.failures


def test_digest_is_sha256_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 5000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
