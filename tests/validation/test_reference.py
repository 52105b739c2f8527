from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calque.errors import ArtifactUnreadable, SourceUnreadable, Unsupported
from calque.validation.compare import compare
from calque.validation.drive import ModelIO
from calque.validation.eager import eager_states
from calque.validation.reference import needed, read_references, store_reference
from calque.validation.tolerance import TOLERANCES, tolerance
from tests.tiny_models import TINY, eager_model
from tests.validation.gate import Broken, gate


def slightly_larger(inputs: dict[str, Any], run: Any) -> dict[str, Any]:
    outputs: dict[str, Any] = run(inputs)
    return {**outputs, "logits": outputs["logits"] * np.float32(1.001)}


def stored_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "reference").glob("*.npz"))}


def store(folder: Path, name: str = "llama", budget: int = 8_000_000) -> dict[str, bytes]:
    made = gate(name)
    (folder / "scratch").mkdir(parents=True)
    store_reference(lambda: made.model, made.scenarios, ModelIO.of(made.artifact), folder, folder / "scratch", budget=budget)
    return stored_bytes(folder)


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    assert store(tmp_path / "a") == store(tmp_path / "b")


def test_the_stored_references_judge_as_the_whole_ones_do() -> None:
    for name, picked in (("gpt2", None), ("phi3", {"across-16", "across-16-left", "continued-past-16"})):
        made = gate(name)
        io = ModelIO.of(made.artifact)
        for scenario, reference in read_references(made.folder):
            if picked and scenario.name not in picked:
                continue
            again = compare(made.session(), io, scenario, reference)
            first = compare(made.session(), io, scenario, made.references[scenario.name])
            assert {**again, "seconds": 0} == {**first, "seconds": 0}


@pytest.mark.parametrize("budget", [300_000, 120_000])
def test_a_small_budget_keeps_evenly_spaced_columns(tmp_path: Path, budget: int) -> None:
    files = store(tmp_path, "gemma2", budget)
    assert sum(map(len, files.values())) <= budget
    made = gate("gemma2")
    io = ModelIO.of(made.artifact)
    for scenario, references in read_references(tmp_path):
        reference = references["logits"]
        assert reference.columns is not None
        assert 16 <= len(reference.columns) < 211
        assert (reference.columns[0], reference.columns[-1]) == (0, 210)
        assert reference.sigmas == made.references[scenario.name]["logits"].sigmas
        if scenario.name not in ("single-prompt", "ragged-left"):
            continue
        assert compare(made.session(), io, scenario, references)["status"] == "passed"
        assert compare(Broken(made.session(), slightly_larger), io, scenario, references)["status"] == "failed"


def test_another_likeliest_token_outside_the_kept_columns_is_seen(tmp_path: Path) -> None:
    store(tmp_path, "llama", 120_000)
    made = gate("llama")
    scenario, references = next(pair for pair in read_references(tmp_path) if pair[0].name == "single-prompt")
    reference = references["logits"]
    assert reference.columns is not None
    hidden = next(i for i in range(211) if i not in reference.columns)

    def raise_one(inputs: dict[str, Any], run: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = run(inputs)
        logits = outputs["logits"].copy()
        logits[:, :, hidden] += 20
        return {**outputs, "logits": logits}

    row = compare(Broken(made.session(), raise_one), ModelIO.of(made.artifact), scenario, references)
    assert row["status"] == "failed"
    assert "another likeliest token" in row["reason"]


def test_one_forward_a_pool_row_and_two_where_the_frequencies_change(tmp_path: Path) -> None:
    for name, forwards in (("llama", 5), ("phi3", 5 + 2)):
        made = gate(name)
        seen: list[tuple[int, ...]] = []

        def note(_module: Any, _args: Any, named: dict[str, Any], seen: list[tuple[int, ...]] = seen) -> None:
            seen.append(tuple(named["input_ids"].shape))

        handle = made.model.register_forward_pre_hook(note, with_kwargs=True)
        store(tmp_path / name, name)
        handle.remove()
        assert len(seen) == forwards
        assert all(shape[0] == 1 for shape in seen)


def test_positions_reached_before_and_after_the_threshold_are_kept_apart() -> None:
    made = gate("phi3")
    [scenario] = made.pick("across-16")
    parts = needed(scenario)
    assert parts[0, False].tolist() == list(range(16))
    assert parts[0, True].tolist() == list(range(21))
    tables = made.references["across-16"]["logits"].tables
    same = parts[0, False]
    assert np.abs(tables[0, False].at(same).values - tables[0, True].at(same).values).max() > 0.1


def test_a_model_that_says_nan_proves_nothing(tmp_path: Path) -> None:
    model = eager_model(TINY["llama"])
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3] = float("nan")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(SourceUnreadable, match="NaN or infinity"):
        store_reference(lambda: model, gate("llama").scenarios, ModelIO.of(gate("llama").artifact), tmp_path, tmp_path / "scratch")


def test_eager_states_hold_every_position_of_sliding_layers() -> None:
    made = gate("gemma2")
    states = eager_states(made.model, list(range(3, 33)))
    assert sorted(states) == ["present.0.key", "present.0.value", "present.1.key", "present.1.value"]
    assert {array.shape for array in states.values()} == {(1, 2, 30, 24)}


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_folder_without_good_references_is_refused(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "reference").mkdir()
    if content is not None:
        (tmp_path / "reference" / "single-prompt.npz").write_bytes(content)
    with pytest.raises(ArtifactUnreadable, match="reference"):
        list(read_references(tmp_path))


def test_the_limit_lies_above_the_noise_and_below_what_a_weight_does() -> None:
    for row in TOLERANCES.values():
        assert row.factor >= 2
        assert row.reason
        # Of a model in float32 a weight that is 1 % off is 1e-3 σ; narrow types have noise of their own.
        assert row.limit(2) < {"float32": 1e-4, "int8 with experts": 10}.get(row.dtype, 1)
    with pytest.raises(Unsupported, match="float8"):
        tolerance("float8")
