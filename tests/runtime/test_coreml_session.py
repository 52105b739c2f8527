"""Sessions of Core ML packages: what Core ML has not and the session makes up for, on the interpreter and on a stand-in for Core ML."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calque.artifact import Artifact, GraphSpec, Limits, TensorSpec
from calque.errors import ArtifactUnreadable, TargetUnavailable, UsageError
from calque.runtime import coreml_session
from calque.runtime.coreml_session import CORE_ML, INTERPRETER, CoreMLSession, function_name, io_name
from calque.states import StateSpec
from tests.runtime import mil_packages

Arrays = dict[str, NDArray[Any]]
PAST, PRESENT = "past_key_values.0.key", "present.0.key"


def artifact(folder: Path, in_place: bool = False) -> Artifact:
    """An artifact of one state, its package beside the point."""
    slots: int | str = 4 if in_place else "past_sequence_length"
    shape = ("batch_size", 1, slots, 2)
    more = ("write_indices",) if in_place else ("attention_mask",)
    inputs = (
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
        *(TensorSpec(name, "int64", ("batch_size",) if in_place else ("batch_size", "total_sequence_length")) for name in more),
        TensorSpec(PAST, "float16", shape),
    )
    outputs = (TensorSpec("logits", "float32", ("batch_size", "sequence_length", 2)), TensorSpec(PRESENT, "float16", shape))
    state = StateSpec(0, "key", PAST, PRESENT, None if in_place else 2, "in_place" if in_place else "append", None, "float16", shape)
    graph = GraphSpec("model.mlpackage", inputs, outputs)
    (folder / "model.mlpackage").mkdir(exist_ok=True)
    return Artifact(
        folder=folder, target="coreml", recipe={}, source={}, precision="fp16", files={}, graphs={"model": graph}, states=(state,),
        passes={}, tools={}, limits=Limits(),
    )  # fmt: skip


class FakeState:
    def __init__(self) -> None:
        self.held: Arrays = {}

    def write_state(self, name: str, array: NDArray[Any]) -> None:
        self.held[name] = array.copy()

    def read_state(self, name: str) -> NDArray[Any]:
        return self.held[name]


class FakeModel:
    """Core ML as coremltools shows it: gives the past with one slot more, or counts in its state; remembers what it was given."""

    calls: list[Arrays]

    def __init__(self, path: str, function_name: str | None = None) -> None:
        if "refused" in path:
            raise RuntimeError("Failed to build the model execution plan")
        FakeModel.calls = []

    def make_state(self) -> FakeState:
        return FakeState()

    def predict(self, inputs: Arrays, state: FakeState | None = None) -> Arrays:
        FakeModel.calls.append(inputs)
        logits = np.zeros((*inputs["input_ids"].shape, 2), np.float32)
        if state is not None:
            state.held["past_key_values_0_key"] += 1
            return {"logits": logits}
        past = inputs["past_key_values_0_key"]
        return {"logits": logits, "present_0_key": np.concatenate([past, np.ones_like(past[:, :, :1])], axis=2)}


@pytest.fixture
def core_ml(monkeypatch: pytest.MonkeyPatch) -> None:
    models = types.ModuleType("coremltools.models")
    models.MLModel = FakeModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "coremltools.models", models)
    monkeypatch.setattr(coreml_session, "on_mac", lambda: True)


def call(rows: int, held: int, size: int = 2) -> Arrays:
    ids = np.ones((rows, size), np.int64)
    past = np.zeros((rows, 1, held, 2), np.float16)
    return {"input_ids": ids, "attention_mask": np.ones((rows, held + size), np.int64), PAST: past}


def test_names_are_those_that_core_ml_takes() -> None:
    assert io_name(PAST) == "past_key_values_0_key"
    assert [function_name(graph) for graph in ("model", "prefill", "decode")] == ["main", "prefill", "decode"]


@pytest.mark.usefixtures("core_ml")
def test_an_empty_past_is_a_slot_that_the_mask_hides(tmp_path: Path) -> None:
    session = CoreMLSession(artifact(tmp_path))
    found = session("model", call(2, 0))
    given = FakeModel.calls[0]
    assert given["past_key_values_0_key"].shape == (2, 1, 1, 2)
    assert given["attention_mask"].tolist() == [[0, 1, 1]] * 2
    assert given["input_ids"].dtype == given["attention_mask"].dtype == np.int32
    assert found[PRESENT].tolist() == np.ones((2, 1, 1, 2)).tolist()
    assert session("model", call(1, 3))[PRESENT].shape == (1, 1, 4, 2)
    assert FakeModel.calls[-1]["attention_mask"].tolist() == [[1] * 5]


@pytest.mark.usefixtures("core_ml")
def test_rows_have_a_state_each(tmp_path: Path) -> None:
    session = CoreMLSession(artifact(tmp_path, in_place=True))
    past = np.arange(3, dtype=np.float16)[:, None, None, None] * np.ones((1, 1, 4, 2), np.float16)
    found = session.run("model", {"input_ids": np.ones((3, 2), np.int64), "write_indices": np.zeros(3, np.int64), PAST: past})
    assert [given["input_ids"].shape for given in FakeModel.calls] == [(1, 2)] * 3
    assert all("past_key_values_0_key" not in given for given in FakeModel.calls)
    np.testing.assert_array_equal(found[PRESENT], past + 1)
    assert found["logits"].shape == (3, 2, 2)


@pytest.mark.usefixtures("core_ml")
def test_what_core_ml_refuses_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "refused"
    folder.mkdir()
    session = CoreMLSession(artifact(folder))
    assert session.by == CORE_ML
    with pytest.raises(ArtifactUnreadable, match="execution plan"):
        session("model", call(1, 0))


def test_a_mac_without_coremltools_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml_session, "on_mac", lambda: True)
    monkeypatch.setitem(sys.modules, "coremltools.models", None)
    with pytest.raises(TargetUnavailable, match="coremltools cannot be imported"):
        CoreMLSession(artifact(tmp_path)).open_all()


def test_elsewhere_the_interpreter_runs_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml_session, "on_mac", lambda: False)
    made = artifact(tmp_path)
    shutil.rmtree(tmp_path / "model.mlpackage")
    doubled = {"logits": lambda mb, x: mb.add(x=x, y=x)}
    mil_packages.package(tmp_path / "model.mlpackage", doubled, np.ones((1, 2), np.int32))
    graph = GraphSpec("model.mlpackage", (TensorSpec("x", "int64", (1, 2)),), (TensorSpec("logits_0", "int32", (1, 2)),))
    made = dataclasses.replace(made, graphs={"model": graph}, states=())
    session = CoreMLSession(made)
    assert session.by == INTERPRETER
    assert session("model", {"x": np.array([[3, 4]])})["logits_0"].tolist() == [[6, 8]]
    with pytest.raises(UsageError, match="do not fit"):
        session("model", {"x": np.array([[3.0, 4.0]])})


def test_a_package_that_is_gone_is_said(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    shutil.rmtree(tmp_path / "model.mlpackage")
    with pytest.raises(ArtifactUnreadable, match="is missing"):
        CoreMLSession(made).open_all()
