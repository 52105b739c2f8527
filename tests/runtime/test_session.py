from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calque.artifact import Artifact, Limits
from calque.errors import ArtifactUnreadable, TargetUnavailable, Unsupported, UsageError
from calque.runtime import OnnxRuntimeSession, load, open_session
from calque.runtime.limits import check_limits
from tests.runtime.counting import SIZE, Counting, write_counting


def call(past: int = 0, new: int = 2, batch: int = 1, mask: Any = None) -> dict[str, Any]:
    total = past + new
    return {
        "input_ids": np.full((batch, new), 4, np.int64),
        "attention_mask": np.ones((batch, total), np.int64) if mask is None else np.array(mask, np.int64),
        "position_ids": np.broadcast_to(np.arange(past, total), (batch, new)),
        "past_key_values.0.key": np.zeros((batch, 1, past, SIZE), np.float32),
        "past_key_values.0.value": np.zeros((batch, 1, past, SIZE), np.float32),
    }


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_counting(tmp_path)


def test_every_output_comes_by_name(artifact: Artifact) -> None:
    outputs = open_session(artifact.folder, threads=1)("model", call(past=3))
    assert {name: array.shape for name, array in outputs.items()} == {
        "logits": (1, 2, SIZE),
        "present.0.key": (1, 1, 5, SIZE),
        "present.0.value": (1, 1, 5, SIZE),
    }
    assert int(outputs["logits"][0, -1].argmax()) == 5


def test_the_graph_is_opened_at_its_first_call_and_once(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened = []
    real = onnxruntime.InferenceSession

    def counted(path: str, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    session = OnnxRuntimeSession(artifact)
    assert opened == []
    session("model", call())
    session("model", call())
    assert len(opened) == 1


WRONG: list[tuple[str, Any, str]] = [
    ("input_ids", None, "input_ids  missing"),
    ("extra", np.zeros(1), "extra  unexpected"),
    ("input_ids", np.zeros((1, 2), np.int32), "input_ids  dtype int32, int64 expected"),
    ("input_ids", np.zeros(2, np.int64), "input_ids  shape [2], ['batch_size', 'sequence_length'] expected"),
    ("position_ids", np.zeros((2, 2), np.int64), "batch_size being 1 by input_ids"),
    ("past_key_values.0.key", np.zeros((1, 2, 0, SIZE), np.float32), "1 being 1 by the graph"),
    ("attention_mask", np.ones((1, 3), np.int64), "attention_mask  3 columns, past 0 + new 2 expected"),
]


@pytest.mark.parametrize(("name", "array", "line"), WRONG, ids=[line for _, _, line in WRONG])
def test_inputs_that_do_not_fit_are_refused_by_name(artifact: Artifact, name: str, array: Any, line: str) -> None:
    inputs = call()
    if array is None:
        del inputs[name]
    else:
        inputs[name] = array
    with pytest.raises(UsageError) as caught:
        OnnxRuntimeSession(artifact)("model", inputs)
    assert any(line in where for where in caught.value.where)


def test_every_wrong_input_is_listed(artifact: Artifact) -> None:
    with pytest.raises(UsageError) as caught:
        OnnxRuntimeSession(artifact)("model", {"input_ids": np.zeros((1, 2), np.int32), "x": np.zeros(1)})
    assert len(caught.value.where) == 6


def test_a_graph_that_is_not_there_is_a_usage_error(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="no graph 'decoder'"):
        OnnxRuntimeSession(artifact)("decoder", call())


LEFT, RIGHT = [[0, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]]
REFUSED: list[tuple[Limits, dict[str, Any], str]] = [
    (Limits(padding="none"), call(0, 3, 2, LEFT), "no padding"),
    (Limits(padding="none"), call(0, 3, 2, RIGHT), "no padding"),
    (Limits(padding="right"), call(0, 3, 2, LEFT), "padding on the right alone"),
    (Limits(padding="right"), call(2, 1, 2, RIGHT), "token of every row"),
    (Limits(padding="right"), call(0, 3, 1, [[1, 0, 1]]), "padding on the right alone"),
    (Limits(padding="right"), call(2, 3, 1, [[1, 1, 0, 1, 1]]), "padding on the right alone"),
    (Limits(padding="right"), call(0, 3, 2, [[0, 0, 0], [1, 1, 1]]), "at least one token of every row"),
    (Limits(padding="right"), call(2, 1, 2, [[1, 1, 0], [1, 1, 1]]), "at least one token of every row"),
    (Limits(padding="right"), call(2, 3, 1, [[1, 1, 1, 1, 0]]), "no padding among tokens that continue a cache"),
    (Limits(padding="right", max_length=4), call(0, 5, 1, [[1, 1, 1, 0, 0]]), "5 slots, padding among them"),
    (Limits(padding="right", max_length=4), call(4, 1, 2, [[1, 1, 0, 0, 1], [1, 0, 0, 0, 1]]), "5 slots, padding among them"),
    (Limits(batched_chunk=False), call(3, 2, 2), "2 tokens of 2 rows at once"),
    (Limits(max_length=4), call(3, 2), "5 tokens, the artifact's max_length is 4"),
    (Limits(recompute_at=3), call(3, 1), "past 3"),
    (Limits(recompute_at=3), call(1, 4), "past 3"),
    (Limits(recompute_at=3), call(3, 1, 2, [[0, 0, 1, 1], [1, 1, 1, 1]]), "past 3"),
]


@pytest.mark.parametrize(("limits", "inputs", "what"), REFUSED, ids=[f"{i}-{r[2]}" for i, r in enumerate(REFUSED)])
def test_what_is_past_a_limit_is_refused_before_it_runs(artifact: Artifact, limits: Limits, inputs: Mapping[str, Any], what: str) -> None:
    session = OnnxRuntimeSession(replace(artifact, limits=limits))
    with pytest.raises(Unsupported, match=what) as caught:
        session("model", inputs)
    assert caught.value.fix
    assert session._open == {}


ALLOWED: list[tuple[Limits, dict[str, Any]]] = [
    (Limits(), call(3, 2, 2, [[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]])),
    (Limits(padding="right"), call(0, 3, 2, RIGHT)),
    (Limits(padding="right"), call(2, 1, 2, [[1, 0, 1], [1, 1, 1]])),
    (Limits(padding="right"), call(0, 3, 2, RIGHT)),
    (Limits(padding="right"), call(2, 2, 1)),
    (Limits(padding="right"), call(4, 1, 2, [[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]])),
    (Limits(padding="right", max_length=4), call(3, 1, 2, [[1, 1, 0, 1], [1, 1, 1, 1]])),
    (Limits(padding="none"), call(3, 2, 2)),
    (Limits(), call(2, 1, 2, [[1, 1, 0], [1, 1, 1]])),
    (Limits(), call(2, 3, 1, [[1, 1, 0, 1, 0]])),
    (Limits(batched_chunk=False), call(3, 1, 2)),
    (Limits(batched_chunk=False), call(3, 2, 1)),
    (Limits(batched_chunk=False), call(0, 3, 2)),
    (Limits(max_length=4), call(0, 5, 1, [[0, 1, 1, 1, 1]])),
    (Limits(recompute_at=3), call(2, 1)),
    (Limits(recompute_at=3), call(4, 1)),
    (Limits(recompute_at=3), call(0, 5)),
    (Limits(recompute_at=3), call(3, 1, 2, [[0, 0, 1, 1], [0, 1, 1, 1]])),
]


@pytest.mark.parametrize(("limits", "inputs"), ALLOWED)
def test_what_is_within_the_limits_is_let_through(limits: Limits, inputs: dict[str, Any]) -> None:
    check_limits(limits, inputs)


@pytest.mark.parametrize("damage", [b"", b"not a model", None])
def test_a_corrupt_model_is_said_to_be_one(artifact: Artifact, damage: bytes | None) -> None:
    path = artifact.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    with pytest.raises(ArtifactUnreadable, match=r"model\.onnx"):
        OnnxRuntimeSession(artifact)("model", call())


def test_a_missing_model_is_said_to_be_missing(artifact: Artifact) -> None:
    (artifact.folder / "model.onnx").unlink()
    with pytest.raises(ArtifactUnreadable, match="is missing"):
        OnnxRuntimeSession(artifact)("model", call())


def test_an_error_while_running_is_reported_with_onnxruntimes_text(artifact: Artifact) -> None:
    inputs = call()
    inputs["input_ids"][:] = SIZE + 5
    with pytest.raises(ArtifactUnreadable, match="indices element out of data bounds"):
        OnnxRuntimeSession(artifact)("model", inputs)


def test_a_graph_other_than_the_manifests_is_refused(tmp_path: Path) -> None:
    asking, plain = tmp_path / "asking", tmp_path / "plain"
    asking.mkdir()
    plain.mkdir()
    write_counting(asking, Counting(keep_input=True))
    artifact = write_counting(plain)
    (plain / "model.onnx").write_bytes((asking / "model.onnx").read_bytes())
    with pytest.raises(ArtifactUnreadable) as caught:
        OnnxRuntimeSession(artifact)("model", call())
    assert caught.value.where == ("input num_logits_to_keep  in the graph, not in the manifest",)


def test_another_targets_artifact_is_not_opened(tmp_path: Path) -> None:
    write_counting(tmp_path, Counting(target="paper"))
    assert load(tmp_path).target == "paper"
    with pytest.raises(TargetUnavailable, match="paper"):
        open_session(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactUnreadable):
        open_session(tmp_path / "nothing")


def test_a_batch_of_no_rows_is_a_usage_error_and_does_not_run(artifact: Artifact) -> None:
    session = OnnxRuntimeSession(artifact)
    with pytest.raises(UsageError, match="do not fit") as caught:
        session("model", call(0, 2, 0))
    assert any("at least one token expected" in line for line in caught.value.where)
    assert session._open == {}
