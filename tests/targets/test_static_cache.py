"""Artifacts whose keys and values lie in slots: their files, their proof, and the runtime over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calque.artifact import Artifact
from calque.errors import CalqueError, UsageError
from calque.pipeline import convert
from calque.recipe import Dims, Recipe
from calque.runtime import Decoder, open_session
from tests.tiny_models import TINY, save_random

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here

SLOTS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint, and its artifacts of both layouts."""
    folder = tmp_path_factory.mktemp("static")
    save_random(TINY["gemma3_text"], folder / "model")
    for name, options, dims in (("slots", {"cache": "static"}, Dims(max_length=SLOTS)), ("grown", {}, Dims())):
        convert(Recipe(model=str(folder / "model"), target="onnxruntime", options=options, dims=dims), folder / name)
    return folder


def test_the_manifest_says_slots_and_what_they_hold(place: Path) -> None:
    made = Artifact.read(place / "slots")
    assert (made.limits.padding, made.limits.max_length, made.limits.batched_chunk) == ("right", SLOTS, True)
    assert {(state.update, state.shape[2]) for state in made.states} == {("in_place", SLOTS)}
    assert [spec.name for spec in made.graphs["model"].inputs][:4] == ["input_ids", "position_ids", "write_indices", "kv_lengths"]
    assert made.passes["cache_static"] == len(made.states)
    assert not (made.folder / "genai_config.json").exists()


def test_the_proof_fills_the_last_slot_and_refuses_what_comes_after(place: Path) -> None:
    stored = {path.stem for path in (place / "slots" / "reference").glob("*.npz")}
    assert {"full-length", "full-length-right", "past-full-length", "ragged-right", "past-window-8-right"} <= stored


def test_the_graph_is_of_the_opset_that_has_slots(place: Path) -> None:
    model = onnx.load(place / "slots" / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 24
    counts = [sum(node.op_type == kind for node in model.graph.node) for kind in ("TensorScatter", "Attention", "Concat")]
    assert counts[:2] == [6, 3]
    onnx.checker.check_model(standard(place))


def standard(place: Path) -> onnx.ModelProto:
    """The same in standard operators, which the checker knows."""
    out = place / "standard"
    if not out.exists():
        options = {"cache": "static", "operators": "standard"}
        convert(Recipe(model=str(place / "model"), target="onnxruntime", options=options, dims=Dims(max_length=SLOTS)), out)
    model = onnx.load(out / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    return model


def test_the_runtime_decodes_ragged_rows_as_over_a_cache_that_grows(place: Path) -> None:
    found: list[np.ndarray] = []
    for name in ("slots", "grown"):
        decoder = Decoder(Artifact.read(place / name), open_session(place / name), rows=2)
        mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        told = [np.array(decoder(np.array([[5, 9, 17, 20, 31], [40, 41, 0, 0, 0]]), mask))[[0, 1], [4, 1]]]
        for _ in range(20):
            told.append(np.array(decoder(told[-1].argmax(-1)[:, None]))[:, -1])
        found.append(np.stack(told))
    assert np.abs(found[0] - found[1]).max() <= 1e-4 * found[1].std()


def test_padding_profiles_do_not_go_with_slots(tmp_path: Path) -> None:
    with pytest.raises(CalqueError, match="belongs to cache: dynamic") as caught:
        convert(Recipe(model="builtin:quill", target="onnxruntime", options={"cache": "static", "padding": "none"}), tmp_path / "out")
    assert caught.value.exit_code == UsageError.exit_code
