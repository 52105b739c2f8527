from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from calque.random_weights import write_random_weights
from tests.tiny_vision import save_random

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "gpt_oss", "bloom"]
# Types whose published checkpoints have other names than the module, or that hold persistent buffers.
RENAMED = ["qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "ernie4_5_moe"]
TOKENS = 20


def config(model_type: str, **changes: Any) -> PreTrainedConfig:
    shape: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape |= {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    shape |= {"first_k_dense_replace": 1}
    shape |= {"moe_intermediate_size": 48, "moe_num_experts": 4, "moe_k": 2, "sliding_window": 8, "query_pre_attn_scalar": 16}
    return CONFIG_MAPPING[model_type](**shape | changes)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    return model.eval(), report


def forward(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Logits [T, V] in float32 and float64, attention weights [heads, T, T] per layer."""
    model, _ = load(folder)
    tokens = torch.randint(3, 96, (1, TOKENS), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        output = model(tokens, output_attentions=True)
        exact = model.double()(tokens).logits[0]
    return output.logits[0].double(), exact, [layer[0].double() for layer in output.attentions]


def values(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def written(model_type: str, tmp_path: Path) -> Path:
    config(model_type).save_pretrained(tmp_path)
    return write_random_weights(config(model_type), tmp_path).parent


@pytest.mark.parametrize("model_type", DECODERS + RENAMED)
def test_loading_gives_exactly_the_written_values(model_type: str, written: Path) -> None:
    model, report = load(written)
    assert not any(report.values())
    state = model.state_dict()
    for name, tensor in values(written).items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


@pytest.mark.parametrize("model_type", DECODERS)
def test_attention_is_far_from_uniform(model_type: str, written: Path) -> None:
    _, _, attentions = forward(written)
    ratios = []
    for weights in attentions:
        # Masked keys have weight 0 exactly; sinks take a share that is not among the keys.
        visible = (weights > 0).sum(-1).amax(0)[4:]
        shares = weights / weights.sum(-1, keepdim=True)
        entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1)[:, 4:]
        ratios.append((entropy / visible.log()).mean())
    assert torch.stack(ratios).mean() < 0.7


@pytest.mark.parametrize("model_type", DECODERS)
def test_logits_are_finite_and_float32_is_precise(model_type: str, written: Path) -> None:
    logits, exact, _ = forward(written)
    assert torch.isfinite(logits).all()
    assert 0.3 < exact.std() < 30
    assert (logits - exact).abs().max() / exact.std() < 2e-5


@pytest.mark.parametrize(("model_type", "mean"), [("llama", 1.5), ("gemma3_text", 0.5), ("gpt_neox", 1.5)])
def test_norm_weights_scatter_beside_the_models_own_value(model_type: str, mean: float, written: Path) -> None:
    norms = torch.cat([value for name, value in values(written).items() if "norm" in name and name.endswith("weight")])
    assert abs(norms.mean() - mean) < 0.1
    assert 0.1 < norms.std() < 0.3


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "bloom"])
def test_biases_are_not_zero(model_type: str, written: Path) -> None:
    biases = [value for name, value in values(written).items() if name.endswith("bias")]
    assert biases
    assert all(0.1 < bias.std() < 0.3 for bias in biases)


@pytest.mark.parametrize("model_type", ["deepseek_v3"])
def test_persistent_buffers_keep_the_models_own_values(model_type: str, written: Path) -> None:
    buffers = [value for name, value in values(written).items() if name.endswith("e_score_correction_bias")]
    assert buffers
    assert not any(buffer.any() for buffer in buffers)


def test_statistics_of_batch_norms_are_those_of_a_trained_model(tmp_path: Path) -> None:
    drawn = values(save_random(tmp_path, "resnet"))
    means = torch.cat([value for name, value in drawn.items() if name.endswith("running_mean")])
    variances = torch.cat([value for name, value in drawn.items() if name.endswith("running_var")])
    assert float(means.std()) > 0.1
    assert float(variances.min()) > 0.5
    assert float(variances.std()) > 0.1
    assert not any(value.any() for name, value in drawn.items() if name.endswith("num_batches_tracked"))


def test_tied_parameter_is_written_once_under_the_name_that_others_tie_to(tmp_path: Path) -> None:
    tied = load_file(write_random_weights(config("llama", tie_word_embeddings=True), tmp_path))
    assert "model.embed_tokens.weight" in tied
    assert "lm_head.weight" not in tied
    assert "lm_head.weight" in load_file(write_random_weights(config("llama", tie_word_embeddings=False), tmp_path))


def test_bytes_are_the_same_on_each_run_and_differ_by_seed(tmp_path: Path) -> None:
    def content(seed: int) -> bytes:
        return write_random_weights(config("gpt_oss"), tmp_path, seed).read_bytes()

    torch.manual_seed(1)
    first = content(0)
    torch.manual_seed(2)
    assert content(0) == first
    assert content(1) != first


def test_global_generator_and_config_are_left_alone(tmp_path: Path) -> None:
    given = config("gpt_oss")
    before, state = given.to_dict(), torch.random.get_rng_state()
    write_random_weights(given, tmp_path)
    assert given.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tensor_depends_on_its_name_and_not_on_the_other_tensors(tmp_path: Path) -> None:
    few = load_file(write_random_weights(config("llama", num_hidden_layers=2), tmp_path))
    more = load_file(write_random_weights(config("llama", num_hidden_layers=3), tmp_path))
    assert few.keys() < more.keys()
    assert all(torch.equal(more[name], tensor) for name, tensor in few.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_the_configs(dtype: str, tmp_path: Path) -> None:
    tensors = load_file(write_random_weights(config("qwen3", dtype=dtype), tmp_path))
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


def test_file_follows_the_format_to_the_letter(tmp_path: Path) -> None:
    path = write_random_weights(config("deepseek_v3", dtype="bfloat16"), tmp_path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    del entries["__metadata__"]
    size = {"F32": 4, "BF16": 2}
    assert all(entry["data_offsets"][0] % size[entry["dtype"]] == 0 for entry in entries.values())


def test_memory_stays_bounded_when_the_model_is_large(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from transformers import LlamaConfig
from calque.random_weights import write_random_weights
from tests.tiny_vision import save_random
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
shape = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
write_random_weights(LlamaConfig(**shape, num_hidden_layers=1), Path(sys.argv[1]))
before = peak()
shape = dict(vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=8)
path = write_random_weights(LlamaConfig(**shape, num_hidden_layers=1, tie_word_embeddings=True), Path(sys.argv[1]))
print(peak() - before, path.stat().st_size / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    growth, size = map(float, done.stdout.split())
    assert size > 180
    assert growth < 60
