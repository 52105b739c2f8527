"""What a runtime of torch is given and what it says is told in Calque's words; threads are given back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from calque.artifact import Artifact, GraphSpec, Limits, TensorSpec
from calque.errors import ArtifactUnreadable, UsageError
from calque.runtime.torch_session import TorchSession

if TYPE_CHECKING:
    from calque.runtime.torch_session import Run

IO = (TensorSpec("x", "float32", ("batch_size", 2)), TensorSpec("ids", "int64", ("batch_size",)))


class Adding(TorchSession):
    runtime = "the adder"

    def load(self, path: Path, graph: str) -> Run:
        if path.read_text() != "right":
            raise RuntimeError("it is not right\nException raised from load at adder.cpp\nframe #0: main")
        return lambda given: [given[0] + given[1][:, None], torch.tensor(torch.get_num_threads())][: 1 + (graph == "two")]


def artifact_in(folder: Path, text: str = "right") -> Artifact:
    (folder / "model.add").write_text(text)
    outputs = (TensorSpec("sum", "float32", ("batch_size", 2)), TensorSpec("threads", "int64", ()))
    graphs = {"one": GraphSpec("model.add", IO, outputs[:1]), "two": GraphSpec("model.add", IO, outputs)}
    graphs["wrong"] = GraphSpec("model.add", IO, outputs)
    return Artifact(folder, "adder", {}, {}, "fp32", {}, graphs, (), {}, {}, Limits())


INPUTS: dict[str, Any] = {"x": np.ones((3, 2), np.float32), "ids": np.arange(3)}


def test_inputs_go_by_position_and_outputs_come_by_name(tmp_path: Path) -> None:
    outputs = Adding(artifact_in(tmp_path))("one", {"ids": INPUTS["ids"], "x": INPUTS["x"]})
    assert outputs["sum"].tolist() == [[1, 1], [2, 2], [3, 3]]


def test_threads_are_those_asked_for_and_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert int(Adding(artifact_in(tmp_path), threads=before + 1)("two", INPUTS)["threads"]) == before + 1
    assert torch.get_num_threads() == before


def test_what_fails_is_told_without_the_runtimes_stack(tmp_path: Path) -> None:
    with pytest.raises(ArtifactUnreadable, match="the adder refuses") as caught:
        Adding(artifact_in(tmp_path, "wrong"))("one", INPUTS)
    assert "it is not right" in str(caught.value)
    assert "frame" not in str(caught.value)
    with pytest.raises(ArtifactUnreadable, match="1 outputs, the manifest names 2"):
        Adding(artifact_in(tmp_path))("wrong", INPUTS)
    artifact = artifact_in(tmp_path)
    (tmp_path / "model.add").unlink()
    with pytest.raises(ArtifactUnreadable, match="missing"):
        Adding(artifact)("one", INPUTS)


def test_inputs_are_held_against_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        Adding(artifact_in(tmp_path))("one", {"x": INPUTS["x"]})
    with pytest.raises(UsageError, match="no graph 'three'"):
        Adding(artifact_in(tmp_path))("three", INPUTS)
