from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from calque.session import Session
from calque.validation.bisect import Divergence, Stage, bisect
from calque.validation.drive import ModelIO
from calque.validation.eager import eager_states
from tests.eager_session import EagerSession
from tests.tiny_models import TINY, eager_model
from tests.validation.gate import Broken, gate
from tests.validation.test_gate import nan_in_padded_slots, present_before_update


def find(broken: Session, scenario: str = "ragged-left", name: str = "gemma3_text", with_eager: bool = True) -> Divergence | None:
    made = gate(name)
    io = ModelIO.of(made.artifact)
    stages = [Stage("traced", made.session, io), Stage("cache_dynamic", lambda: broken, io), Stage("artifact", lambda: broken, io)]
    [picked] = made.pick(scenario)
    eager = (lambda tokens: eager_states(made.model, tokens)) if with_eager else None
    return bisect(stages, picked, made.references[scenario], eager)


def off(name: str, parameter: str, factor: float) -> EagerSession:
    made = gate(name)
    model = copy.deepcopy(made.model)
    with torch.no_grad():
        model.get_parameter(parameter).mul_(factor)
    return EagerSession(model, made.limits)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert find(gate("gemma3_text").session()) is None


def test_the_first_stage_and_layer_are_named() -> None:
    for with_eager in (True, False):
        found = find(off("gemma3_text", "model.layers.1.self_attn.v_proj.weight", -1.0), with_eager=with_eager)
        assert found is not None
        assert (found.stage, found.layer, found.kind) == ("cache_dynamic", 1, "value")
        assert found.text.startswith("first diverges at stage 'cache_dynamic', layer 1 value: ")
        assert "(layer 0 agrees to " in found.text


def test_a_fault_in_an_mlp_shows_between_two_layers() -> None:
    found = find(off("gemma3_text", "model.layers.1.mlp.down_proj.weight", -1.0))
    assert found is not None
    assert found.layer == 2
    assert "(layers 0–1 agree to" in found.text
    assert "between layer 1's cache and layer 2's" in found.text


def test_a_fault_after_the_last_cache_is_said_to_be_there() -> None:
    found = find(off("gemma3_text", "model.layers.2.mlp.down_proj.weight", -1.0))
    assert found is not None
    assert found.layer is None
    assert "after layer 2's attention (its MLP, final norm or head)" in found.text


def test_a_cache_that_is_stale_is_named_by_its_output() -> None:
    found = find(Broken(gate("gemma3_text").session(), present_before_update))
    assert found is not None
    assert "present.0.key has shape" in found.text


def test_nan_in_padding_is_not_blamed_on_the_cache_that_hides_it() -> None:
    found = find(Broken(gate("gemma3_text").session(), nan_in_padded_slots))
    assert found is not None
    # Valid slots of the first layer stay right; what is computed from the padded ones does not.
    assert (found.layer, "NaN" in found.text) == (1, True)


def test_states_across_the_longrope_threshold_are_compared_with_those_of_the_row_alone() -> None:
    made = gate("phi3")
    assert find(made.session(), "across-16-left", "phi3") is None

    def late(inputs: dict[str, Any], run: Any) -> dict[str, Any]:
        outputs = {name: array.copy() for name, array in run(inputs).items()}
        if inputs["attention_mask"].sum(axis=1).max() > 16:
            outputs["present.1.key"] *= np.float32(1.1)
        return outputs

    found = find(Broken(made.session(), late), "across-16-left", "phi3")
    assert found is not None
    assert (found.layer, found.kind) == (1, "key")


def test_a_refusal_that_is_not_made_names_its_stage() -> None:
    found = find(EagerSession(eager_model(TINY["phi3"])), "continued-past-16", "phi3")
    assert found is not None
    assert found.text == "first diverges at stage 'cache_dynamic': must be refused (recompute_at: 16), was answered"
