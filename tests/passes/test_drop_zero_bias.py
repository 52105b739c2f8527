from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from calque import passes
from calque.converters import causal_lm
from calque.passes import Rewrites
from calque.passes.drop_zero_bias import DropZeroBias
from calque.source import ModelSource
from calque.traced import TracedModel
from tests.passes.check_pass import check_pass
from tests.tiny_models import TYPES, prompt, save_random, traced


def with_zeros(folder: Path, zeros: tuple[str, ...]) -> TracedModel:
    """A Qwen2, whose queries, keys and values have biases; those that end as ``zeros`` say are zeros."""
    save_random(TYPES["qwen2"], folder)
    path = folder / "model.safetensors"
    tensors = {name: torch.zeros_like(value) if name.endswith(zeros) else value for name, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return causal_lm.trace(ModelSource.resolve(str(folder), scratch=folder))


def test_biases_of_zeros_are_added_no_more(tmp_path: Path) -> None:
    model = with_zeros(tmp_path, ("k_proj.bias", "v_proj.bias"))
    assert check_pass(DropZeroBias(), model, prompt(model)) == Rewrites(4)
    left = {name.rsplit(".", 2)[-2] for name in model.parameters() if name.endswith("bias")}
    assert left == {"q_proj"}


def test_a_bias_with_one_value_stays(tmp_path: Path) -> None:
    model = with_zeros(tmp_path, ())
    code = str(model.graph)
    assert passes.run_one(DropZeroBias(), model) == Rewrites(0)
    assert str(model.graph) == code


def test_models_without_biases_are_left_alone() -> None:
    assert passes.run_one(DropZeroBias(), traced("llama")) == Rewrites(0)
