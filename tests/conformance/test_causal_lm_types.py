"""Every type that this release names, shrunken, through the whole gate; and those that it does not, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from calque.artifact import REPORT, Artifact
from calque.errors import Unsupported
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.weights import WeightTable
from tests.tiny_models import TYPES, VOCABULARY, config_of

# What a type must be asked besides the scenarios of all; a row that vanishes would pass unseen.
OWN_SCENARIOS = {
    "mistral": {"past-window-8-left", "past-window-8-right"},
    "qwen2": {"past-window-8-left", "past-window-8-right"},
    "mixtral": {"past-window-8-left", "past-window-8-right"},
    "gemma2": {"past-window-8-left", "past-window-8-right"},
    "gemma3_text": {"past-window-8-left", "past-window-8-right"},
    "phi3": {"past-window-8-left", "past-window-8-right"},
    "gpt_oss": {"past-window-8-left", "past-window-8-right"},
    "phi3-longrope": {"beyond-32", "across-32", "across-32-left", "across-32-right", "continued-past-32"},
    "gpt2": {"full-length", "past-full-length"},
}
COMMON = {
    "single-prompt", "ragged-left", "ragged-right", "chunked-prefill", "chunked-prefill-batch", "chunked-prefill-left",
    "batch-2", "batch-5", "untraced-length", "length-1", "length-1-left", "length-1-right", "full-length",
}  # fmt: skip
SLIDING_LAYERS = {
    "mistral": [0, 1], "qwen2": [1], "mixtral": [0, 1], "gemma2": [0], "gemma3_text": [0, 2], "phi3": [0, 1], "gpt_oss": [0],
}  # fmt: skip


def converted(config: Any, folder: Path) -> Artifact:
    config.save_pretrained(folder / "model")
    place = str(folder / "model" / "config.json")
    recipe = Recipe(model=place, task="text-generation-with-past", target="onnxruntime", random_weights=True)
    return convert(recipe, folder / "out")


# Each has another in the quick run that is made of the same parts.
LIKE_ANOTHER = {"qwen2": "gemma2", "qwen3": "llama", "mixtral": "qwen3_moe", "phi3": "phi3-longrope", "gemma3_text": "gemma2"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LIKE_ANOTHER else ()) for name in TYPES])
def test_shrunken_type_passes_the_whole_gate(name: str, tmp_path: Path) -> None:
    artifact = converted(config_of(TYPES[name]), tmp_path)
    assert artifact.proof.numerics.status == "passed"
    assert artifact.proof.numerics.worst is not None
    assert artifact.proof.numerics.worst < 1e-4
    rows = {row["name"]: row for row in json.loads((artifact.folder / REPORT).read_text())["scenarios"]}
    assert rows.keys() == COMMON | OWN_SCENARIOS.get(name, set())
    assert {row["status"] for row in rows.values()} == {"passed"}
    assert [state.layer for state in artifact.states if state.window and state.kind == "key"] == SLIDING_LAYERS.get(name, [])


def shrunken(model_type: str, **fields: Any) -> Any:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CONFIG_MAPPING[model_type](**shape | fields)


ATTENTION = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
REFUSED = {
    "no-keys-and-values": (shrunken("mamba", state_size=8), "mamba"),
    "not-a-causal-lm": (shrunken("t5", d_model=64, d_ff=96, num_layers=2, num_heads=4), "is no model for text-generation"),
    "hybrid-convolution": (shrunken("lfm2", **ATTENTION, layer_types=["conv", "full_attention"]), "layers of type conv: "),
    "hybrid-recurrent": (
        shrunken("qwen3_next", **ATTENTION, **LINEAR, **EXPERTS, layer_types=["linear_attention", "full_attention"]),
        "layers of type linear_attention: convolutional or recurrent state",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_type_that_needs_more_than_keys_and_values_is_refused_by_name(case: str, tmp_path: Path) -> None:
    config, named = REFUSED[case]
    with pytest.raises(Unsupported) as caught:
        converted(config, tmp_path)
    assert named in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.rejected").exists()


def test_ledger_of_an_unsupported_type_is_never_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(_: WeightTable) -> None:
        pytest.fail("the model was traced")

    monkeypatch.setattr(WeightTable, "check", reached)
    with pytest.raises(Unsupported):
        converted(REFUSED["hybrid-convolution"][0], tmp_path)
