from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from calque.checkpoint import read_headers
from calque.converters import causal_lm
from calque.converters.weight_names import weight_table
from calque.errors import WeightMismatch
from calque.source import ModelSource
from calque.weights import Derived, WeightTable
from tests.tiny_models import TYPES, Tiny, answers, eager_model, prompt

FILE = "model.safetensors"


def saved(tiny: Tiny, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    eager_model(tiny).to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def with_tie(name: str, tied: bool) -> Tiny:
    return replace(TYPES[name], extra={**TYPES[name].extra, "tie_word_embeddings": tied})


def edit(folder: Path, add: dict[str, torch.Tensor] | None = None, drop: tuple[str, ...] = ()) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / FILE).items() if name not in drop}
    save_file(tensors | (add or {}), folder / FILE, {"format": "pt"})


def faked(folder: Path) -> tuple[PreTrainedModel, WeightTable]:
    source = ModelSource.resolve(str(folder), scratch=folder)
    model = causal_lm.build(source, FakeTensorMode(allow_non_fake_inputs=True))
    return model, weight_table(model, source.tensors, source.id)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def checkpoint_names(folder: Path) -> set[str]:
    return set(read_headers(folder))


# From a checkpoint that transformers itself wrote: experts one by one, gate and up apart, under the published names.
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "phi3", "gpt_oss", "gpt2", "bloom", "gpt_neox", "gemma2"])
def test_every_parameter_equals_what_transformers_loads(name: str, tmp_path: Path) -> None:
    _, table = faked(saved(TYPES[name], tmp_path))
    expected = dict(loaded(tmp_path).named_parameters(remove_duplicate=False))
    assert expected.keys() <= table.entries.keys()
    for parameter, tensor in expected.items():
        assert table[parameter].shape == tuple(tensor.shape)
        assert torch.equal(table[parameter].read(), tensor), parameter
    assert table.unused == ()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_a_published_checkpoint_are_merged_when_read(name: str, tmp_path: Path) -> None:
    _, table = faked(saved(TYPES[name], tmp_path))
    assert any(".experts.3." in key for key in checkpoint_names(tmp_path))
    merged = table["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(merged, Derived)
    assert merged.shape[0] == 4
    assert len(merged.sources) == 8


def test_merged_experts_are_cast_to_float32_after_they_are_read(tmp_path: Path) -> None:
    _, table = faked(saved(TYPES["mixtral"], tmp_path, torch.bfloat16))
    expected = dict(loaded(tmp_path).named_parameters())
    for parameter in ("model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj", "model.norm.weight"):
        read = table[parameter].read()
        assert read.dtype == torch.float32
        assert torch.equal(read, expected[parameter]), parameter


@pytest.mark.parametrize("present", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_head_is_one_weight_whichever_name_the_checkpoint_has(present: str, tmp_path: Path) -> None:
    saved(with_tie("llama", True), tmp_path)
    embedding = load_file(tmp_path / FILE)["model.embed_tokens.weight"]
    edit(tmp_path, {present: embedding.clone()}, drop=tuple({"model.embed_tokens.weight"} - {present}))
    model, table = faked(tmp_path)
    assert table["lm_head.weight"] is table["model.embed_tokens.weight"]
    assert table.tied("lm_head.weight") == ["model.embed_tokens.weight"]
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(table["lm_head.weight"].read(), embedding)
    assert table.unused == ()


def test_tied_head_that_is_stored_twice_with_equal_bytes_is_one_weight(tmp_path: Path) -> None:
    saved(with_tie("llama", True), tmp_path)
    edit(tmp_path, {"lm_head.weight": load_file(tmp_path / FILE)["model.embed_tokens.weight"].clone()})
    _, table = faked(tmp_path)
    assert table["lm_head.weight"] is table["model.embed_tokens.weight"]


def test_tied_head_that_is_stored_with_other_bytes_is_untied_as_upstream(tmp_path: Path) -> None:
    saved(with_tie("llama", True), tmp_path)
    head = load_file(tmp_path / FILE)["model.embed_tokens.weight"].flip(0).contiguous()
    edit(tmp_path, {"lm_head.weight": head})
    upstream = loaded(tmp_path)
    assert torch.equal(upstream.lm_head.weight, head)
    model, table = faked(tmp_path)
    assert table["lm_head.weight"] is not table["model.embed_tokens.weight"]
    assert torch.equal(table["lm_head.weight"].read(), head)
    assert model.get_parameter("lm_head.weight") is not model.get_parameter("model.embed_tokens.weight")
    with torch.inference_mode():
        traced = causal_lm.trace(ModelSource.resolve(str(tmp_path), scratch=tmp_path))
        inputs = prompt(traced)
        expected = upstream(input_ids=torch.from_numpy(inputs["input_ids"])).logits.numpy()
    got = answers(traced, inputs)["logits"]
    assert abs(got - expected).max() < 2e-5 * expected.std()


def test_untied_head_is_a_weight_of_its_own(tmp_path: Path) -> None:
    _, table = faked(saved(with_tie("llama", False), tmp_path))
    assert table.tied("lm_head.weight") == []


def traced(folder: Path) -> Any:
    model = causal_lm.trace(ModelSource.resolve(str(folder), scratch=folder))
    model.weights.check()
    return model


def test_unexpected_tensor_is_listed(tmp_path: Path) -> None:
    edit(saved(TYPES["llama"], tmp_path), {"model.layers.0.self_attn.q_norm.weight": torch.ones(24), "adapter.down": torch.ones(2, 2)})
    with pytest.raises(WeightMismatch) as caught:
        traced(tmp_path)
    assert str(caught.value).splitlines()[:3] == [
        f"WeightMismatch: 2 checkpoint tensors have no use in {tmp_path.name}",
        "  adapter.down  in the checkpoint, used by no parameter",
        "  model.layers.0.self_attn.q_norm.weight  in the checkpoint, used by no parameter",
    ]


def test_missing_tensor_is_listed_with_the_nearest_name(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    saved(TYPES["llama"], tmp_path)
    tensor = load_file(tmp_path / FILE)[name]
    edit(tmp_path, {"model.layers.1.mlp.up_prj.weight": tensor.clone()}, drop=(name,))
    with pytest.raises(WeightMismatch) as caught:
        traced(tmp_path)
    assert caught.value.where == (
        f"{name}  [96, 64]  not in the checkpoint; nearest name: model.layers.1.mlp.up_prj.weight",
        "model.layers.1.mlp.up_prj.weight  in the checkpoint, used by no parameter",
    )


def test_tensor_of_another_shape_is_listed(tmp_path: Path) -> None:
    edit(saved(TYPES["llama"], tmp_path), {"model.norm.weight": torch.ones(63)})
    with pytest.raises(WeightMismatch) as caught:
        traced(tmp_path)
    assert caught.value.where == ("model.norm.weight  [64]  the checkpoint holds [63]",)


def test_missing_expert_is_reported_as_a_misfit(tmp_path: Path) -> None:
    saved(TYPES["mixtral"], tmp_path)
    edit(tmp_path, drop=tuple(key for key in checkpoint_names(tmp_path) if ".layers.0." in key and ".experts.2." in key))
    with pytest.raises(WeightMismatch) as caught:
        traced(tmp_path)
    assert caught.value.where == (
        "model.layers.0.mlp.experts.gate_up_proj  [4, 192, 64]  the checkpoint holds [3, 192, 64]",
        "model.layers.0.mlp.experts.down_proj  [4, 64, 96]  the checkpoint holds [3, 64, 96]",
    )


def test_expert_without_one_of_its_matrices_is_reported(tmp_path: Path) -> None:
    saved(TYPES["mixtral"], tmp_path)
    name = next(key for key in checkpoint_names(tmp_path) if ".layers.0." in key and key.endswith(".experts.2.w1.weight"))
    edit(tmp_path, drop=(name,))
    with pytest.raises(WeightMismatch, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        traced(tmp_path)


@pytest.mark.parametrize(
    ("type_name", "tensor"),
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "transformer.h.0.attn.bias")],
)
def test_tensors_that_old_checkpoints_hold_and_no_model_needs_are_waived(type_name: str, tensor: str, tmp_path: Path) -> None:
    edit(saved(TYPES[type_name], tmp_path), {tensor: torch.ones(1, 1, 4, 4)})
    _, table = faked(tmp_path)
    assert table.unused == ()
    assert tensor not in table


def test_checkpoint_without_the_models_prefix_is_read_as_upstream_does(tmp_path: Path) -> None:
    saved(TYPES["gpt2"], tmp_path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / FILE).items()}
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    expected = dict(loaded(tmp_path).named_parameters(remove_duplicate=False))
    _, table = faked(tmp_path)
    assert all(torch.equal(table[name].read(), tensor) for name, tensor in expected.items())
