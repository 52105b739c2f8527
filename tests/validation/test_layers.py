from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from calque.session import Session
from calque.validation.drive import ModelIO
from calque.validation.layers import layer_parity, states_alone, telling_scenario
from tests.validation.gate import Broken, gate
from tests.validation.test_bisect import off


def measured(session: Session, scenario: str, name: str = "gemma3_text") -> tuple[dict[tuple[int, str], float | None], str]:
    made = gate(name)
    [picked] = made.pick(scenario)
    eager, note = states_alone(made.model, picked)
    assert note == ""
    rows, note = layer_parity(session, ModelIO.of(made.artifact), picked, eager)
    assert {row["scenario"] for row in rows} <= {scenario}
    return {(row["layer"], row["kind"]): row["worst_sigma"] for row in rows}, note


@pytest.mark.parametrize("scenario", ["ragged-left", "ragged-right", "chunked-prefill"])
def test_every_layer_of_an_honest_session_lies_within_rounding(scenario: str) -> None:
    made = gate("gemma3_text")
    found, note = measured(made.session(), scenario)
    assert note == ""
    assert list(found) == [(state.layer, str(state.kind)) for state in made.artifact.states]
    assert all(worst is not None and worst < 2e-5 for worst in found.values())


def test_states_past_the_longrope_threshold_are_compared() -> None:
    found, _ = measured(gate("phi3").session(), "across-16-left", "phi3")
    assert found
    assert all(worst is not None and worst < 2e-5 for worst in found.values())


def test_a_wrong_projection_shows_from_its_layer_on() -> None:
    found, _ = measured(off("gemma3_text", "model.layers.1.self_attn.v_proj.weight", -1.0), "ragged-left")
    bad = sorted(place for place, worst in found.items() if worst is None or worst > 1e-3)
    assert bad == [(1, "value"), (2, "key"), (2, "value")]


def test_a_fault_in_the_last_step_alone_is_seen() -> None:
    def late(inputs: dict[str, Any], run: Any) -> dict[str, Any]:
        outputs = {name: array.copy() for name, array in run(inputs).items()}
        if inputs["attention_mask"].shape[1] == 18:
            outputs["present.0.key"][:, :, -1] = np.nan
        return outputs

    found, _ = measured(Broken(gate("gemma3_text").session(), late), "ragged-left")
    assert (found[0, "key"], found[0, "value"] is None) == (None, False)


def test_a_session_that_crashes_leaves_a_sentence() -> None:
    def crash(inputs: dict[str, Any], run: Any) -> dict[str, Any]:
        raise RuntimeError("out of\nslots")

    found, note = measured(Broken(gate("gemma3_text").session(), crash), "ragged-left")
    assert (found, note) == ({}, "Layers could not be compared in ragged-left: RuntimeError: out of slots")


def test_a_model_that_takes_no_plain_cache_leaves_a_sentence() -> None:
    [picked] = gate("gemma3_text").pick("ragged-left")
    states, note = states_alone(torch.nn.Linear(2, 2), picked)
    assert states == {}
    assert note.startswith("Layers could not be compared in ragged-left: TypeError: ")


def test_rows_padded_before_with_steps_tell_most() -> None:
    made = gate("gemma3_text")
    chosen = telling_scenario(made.scenarios)
    assert chosen is not None
    assert (chosen.name, chosen.padding, chosen.decode > 0) == ("ragged-left", "left", True)
    only = telling_scenario(made.pick("batch-2"))
    assert only is not None
    assert only.name == "batch-2"
    assert telling_scenario(gate("phi3").pick("continued-past-16")) is None
