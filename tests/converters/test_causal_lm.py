from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from calque.converters import causal_lm
from calque.errors import SourceUnreadable, Unsupported
from calque.shrink import shrunken
from calque.source import ModelSource
from tests.tiny_models import TYPES, answers, config_of, prompt, source_of, traced

NAMES = ["llama", "qwen3_moe", "gemma2", "gpt_oss", "gpt2", "bloom"]


@pytest.mark.parametrize("name", NAMES)
def test_trace_agrees_with_eager_on_a_left_padded_batch_it_was_not_traced_at(name: str) -> None:
    model = traced(name)
    inputs = prompt(model, 11)
    inputs["attention_mask"][0, :4] = 0
    inputs["position_ids"][0] = (inputs["attention_mask"][0].cumsum() - 1).clip(0)
    got = answers(model, inputs)["logits"]
    eager = source_of(name).load_eager()
    with torch.inference_mode():
        for row, padding in ((0, 4), (1, 0)):
            expected = eager(input_ids=torch.from_numpy(inputs["input_ids"][row : row + 1, padding:])).logits[0].numpy()
            assert abs(got[row, padding:] - expected).max() < 2e-5 * expected.std()


@pytest.mark.parametrize(
    ("name", "windows"), [("gemma2", [8, None]), ("gemma3_text", [8, None, 8]), ("mistral", [8, 8]), ("llama", [None, None])]
)
def test_states_know_the_window_of_their_layer(name: str, windows: list[int | None]) -> None:
    states = traced(name).states
    assert [state.window for state in states if state.kind == "key"] == windows
    assert [state.window for state in states if state.kind == "value"] == windows


@pytest.mark.parametrize(("name", "length"), [("gpt2", 64), ("llama", None), ("bloom", None)])
def test_length_is_limited_where_a_table_of_learned_positions_ends(name: str, length: int | None) -> None:
    assert traced(name).limits.max_length == length


@pytest.mark.parametrize(("name", "length"), [("gptj", 128), ("ctrl", 128), ("opt", 128), ("roberta", 127)])
def test_length_is_limited_where_any_table_read_by_position_ends(name: str, length: int, tmp_path: Path) -> None:
    shrunken(name, causal=True).save_pretrained(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    source = ModelSource.resolve(str(tmp_path / "config.json"), task="text-generation-with-past", random_weights=True, scratch=scratch)
    assert causal_lm.trace(source).limits.max_length == length


def test_longrope_limits_where_a_cache_may_be_continued() -> None:
    assert traced("phi3-longrope").limits.recompute_at == 32


def test_dimensions_are_symbols_that_total_ties_together() -> None:
    inputs = {name: node.meta["val"].shape for name, node in traced("llama").placeholders().items()}
    batch, sequence = inputs["input_ids"]
    past = inputs["past_key_values.0.key"][2]
    assert len({str(batch), str(sequence), str(past)}) == 3
    assert all(isinstance(size, torch.SymInt) for size in (batch, sequence, past))
    assert {str(shape[2]) for name, shape in inputs.items() if "past" in name} == {str(past)}
    assert str(inputs["attention_mask"][1]) in {f"{past} + {sequence}", f"{sequence} + {past}"}


def test_parameter_names_are_those_of_the_checkpoint() -> None:
    assert traced("llama").weights.entries.keys() == source_of("llama").tensors.keys()


def test_forward_of_the_class_is_left_as_it_was() -> None:
    source = source_of("llama")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = causal_lm.build(source, mode)
    forward = type(model).forward
    causal_lm.export(model, mode, causal_lm.record_layers(model, mode))
    assert type(model).forward is forward
    assert "forward" not in vars(model)
    assert source.config._attn_implementation != "calque"


def test_layers_that_keep_keys_and_values_are_found_with_their_sizes() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = causal_lm.build(source_of("gemma3_text"), mode)
    assert causal_lm.record_layers(model, mode) == dict.fromkeys(range(3), (2, 24, 24))


def with_config(**changes: Any) -> Any:
    config = config_of(TYPES["llama"])
    for name, value in changes.items():
        setattr(config, name, value)
    return replace(source_of("llama"), config=config)


def test_layers_that_need_other_states_are_all_named() -> None:
    with pytest.raises(Unsupported) as caught:
        causal_lm.guard(with_config(layer_types=["mamba", "full_attention", "conv"]))
    assert caught.value.where == (
        "layers of type conv: convolutional or recurrent state",
        "layers of type mamba: convolutional or recurrent state",
    )


@pytest.mark.parametrize("kind", sorted(causal_lm.KEY_VALUE_LAYERS))
def test_layers_whose_state_is_keys_and_values_are_let_through(kind: str) -> None:
    causal_lm.guard(with_config(layer_types=[kind, "full_attention"]))


@pytest.mark.parametrize("absurd", [{"vocab_size": -5}, {"pad_token_id": 9999}])
def test_config_values_that_no_model_can_have_are_an_unreadable_source(absurd: dict[str, int]) -> None:
    source = source_of("llama")
    config = config_of(TYPES["llama"])
    for key, value in absurd.items():
        setattr(config, key, value)
    with pytest.raises(SourceUnreadable, match=r"config.json describes no llama model that can be built"):
        causal_lm.trace(replace(source, config=config))
