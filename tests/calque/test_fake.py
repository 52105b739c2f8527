from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from calque.fake import fake_parameters

TYPES = ["llama", "gpt2", "mixtral", "gemma3_text", "gpt_oss", "bloom", "phi3", "qwen3_moe"]


def config(model_type: str) -> PreTrainedConfig:
    shape: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    return CONFIG_MAPPING[model_type](**shape | {"pad_token_id": 0})


def build(model_type: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(model_type))  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("model_type", TYPES)
def test_model_has_fake_parameters_and_real_buffers_when_built_inside(model_type: str) -> None:
    real = build(model_type)
    mode = FakeTensorMode()
    with fake_parameters(mode):
        model = build(model_type)
    expected = {name: (param.shape, param.dtype, param.requires_grad) for name, param in real.named_parameters()}
    found = dict(model.named_parameters())
    assert {name: (param.shape, param.dtype, param.requires_grad) for name, param in found.items()} == expected
    assert all(isinstance(param, FakeTensor) and isinstance(param, torch.nn.Parameter) for param in found.values())
    assert all(param.fake_mode is mode for param in found.values() if isinstance(param, FakeTensor))
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in real.named_buffers())


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma3_text"])
def test_tied_parameters_stay_one_object(model_type: str) -> None:
    with fake_parameters(FakeTensorMode()):
        model: Any = build(model_type)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_shared_parameter_stays_one_object_when_two_modules_register_it() -> None:
    shared = torch.nn.Parameter(torch.ones(3))
    with fake_parameters(FakeTensorMode()):
        one, two = torch.nn.Module(), torch.nn.Module()
        one.register_parameter("weight", shared)
        two.register_parameter("weight", shared)
        two.register_parameter("bias", None)
    assert one.weight is two.weight
    assert two.bias is None
    assert isinstance(one.weight, FakeTensor)


def test_accepted_parameters_stay_real_and_are_initialized() -> None:
    with fake_parameters(FakeTensorMode(), stay_real=lambda param: param.ndim == 1):
        norm, linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    assert torch.equal(norm.weight, torch.ones(4))
    assert isinstance(linear.weight, FakeTensor)


def test_registration_is_restored_when_the_block_fails() -> None:
    before, init = torch.nn.Module.register_parameter, torch.nn.init.normal_
    with pytest.raises(RuntimeError, match="inside"), fake_parameters(FakeTensorMode()):
        raise RuntimeError("inside")
    assert torch.nn.Module.register_parameter is before
    assert torch.nn.init.normal_ is init
    assert not isinstance(torch.nn.Linear(2, 2).weight, FakeTensor)


def test_billion_parameters_take_neither_time_nor_memory() -> None:
    shape: dict[str, Any] = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    large = CONFIG_MAPPING["llama"](**shape | {"num_attention_heads": 32, "num_key_value_heads": 8})

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    build("llama")  # imports, once
    before, start = resident(), time.perf_counter()
    with fake_parameters(FakeTensorMode()):
        model = AutoModelForCausalLM.from_config(large)  # type: ignore[no-untyped-call]
    assert time.perf_counter() - start < 10
    assert resident() - before < 150e6
    assert sum(param.numel() for param in model.parameters()) > 1e9
