"""Prints how far honest arithmetic moves logits, in σ: the figures from which validation/tolerance.py is derived.

Run from the repository root: ``python -m benchmarks.measure_noise [--seeds N] [--dtype float16]``. Every comparison is between two ways to
compute the same function of the same weights, so all of it is noise:

- ``fp64``: eager in float32 against eager in float64 throughout (the float32 islands of transformers included)
- ``whole``, of a narrow dtype: eager in that dtype, as transformers runs it, against eager in float32 with the same weights
- ``mlp``: hidden units of every MLP permuted, so its sums run in another order
- ``heads``: attention heads permuted, group by group where keys are shared
- ``cached``: one token at a time over a cache, in place of one forward
- ``scaled``, of float32: integers multiplied and their sums scaled, against weights that hold integer times scale

Of a narrow dtype all but the reference is computed in it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from calque.random_weights import write_random_weights
from tests.tiny_models import TINY, Tiny, config_of, eager_model

TOKENS, MANY_TOKENS = 64, 1024


@dataclass(frozen=True)
class Noise:
    """Largest and mean |Δ|/σ over all positions and vocabulary entries."""

    worst: float
    mean: float


class Double(TorchFunctionMode):
    """While entered, code that casts to float32 casts to float64 instead."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the call's result, made with float64 wherever float32 was named."""
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return func(*args, **{name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()})


def models(seeds: int) -> Iterator[tuple[str, Tiny, int]]:
    """Yield every model to measure: six types small, four of them deep, one wide, and one of 30M parameters, whose rows are long."""
    small = [name for name in TINY if name != "phi3"]
    for seed in range(seeds):
        for name in small:
            yield "small", TINY[name], seed
        for layers in (8, 24, 48):
            for name in ("llama", "qwen3", "gemma2", "gpt2"):
                yield "deep", replace(TINY[name], layers=layers), seed
        yield (
            "wide",
            replace(TINY["llama"], layers=4, hidden=1024, intermediate=2816, heads=16, kv_heads=4, head_dim=64, vocabulary=8192),
            seed,
        )
        yield (
            "long",
            replace(TINY["llama"], layers=8, hidden=512, intermediate=1408, heads=8, kv_heads=8, head_dim=64, vocabulary=8192),
            seed,
        )


def built(kind: str, tiny: Tiny, seed: int) -> PreTrainedModel:
    """Return the model; one with long rows has the random weights of ``calque convert --random-weights``, which pass more noise on."""
    if kind != "long":
        return eager_model(tiny, seed)
    config = config_of(tiny)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        write_random_weights(config, Path(folder), seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.train(False)
    return model


def measure_narrow(model: PreTrainedModel, tokens: torch.Tensor, dtype: torch.dtype) -> dict[str, Noise]:
    """Return the noise of each comparison of arithmetic in ``dtype`` with float32, on weights that both hold exactly."""
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        want = model(input_ids=tokens, use_cache=False).logits[0]
        narrow = copy.deepcopy(model)
        for parameter in narrow.parameters():  # buffers stay as they are loaded: frequencies of positions are float32 in any model
            parameter.data = parameter.data.to(dtype)
        narrow.config._experts_implementation = "eager"
        found = {"whole": _noise(want, narrow(input_ids=tokens, use_cache=False).logits[0])}
        return found | _reordered(narrow, tokens, want)


def measure(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Noise]:
    """Return the noise of each comparison on this model."""
    with torch.inference_mode():
        want = model(input_ids=tokens, use_cache=False).logits[0]
        found = {}
        double = copy.deepcopy(model).double()
        double.config._experts_implementation = "eager"  # the grouped matmul has no float64 kernel
        with Double():
            exact = double(input_ids=tokens, use_cache=False).logits[0]
        found["fp64"] = _noise(want, exact)
        return found | _reordered(model, tokens, want) | {"scaled": _scaled(model, tokens)}


def _reordered(model: PreTrainedModel, tokens: torch.Tensor, want: torch.Tensor) -> dict[str, Noise]:
    """Return the noise of the model's sums in other orders."""
    found = {}
    for name, permute in (("mlp", permute_mlp), ("heads", permute_heads)):
        other = copy.deepcopy(model)
        permute(other)
        found[name] = _noise(want, other(input_ids=tokens, use_cache=False).logits[0])
    found["cached"] = _noise(want, _cached(model, tokens))
    return found


def _cached(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache()
    steps = [model(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0] for i in range(tokens.shape[1])]
    return torch.cat(steps)


class ScaledSums(torch.nn.Module):
    """A product of integers, whose sums are scaled: ``[…, in] → […, out] float32``, as artifacts with integer weights compute it."""

    def __init__(self, integers: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.integers, self.scales = integers, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        product: torch.Tensor = torch.nn.functional.linear(x, self.integers) * self.scales
        return product


def _scaled(model: PreTrainedModel, tokens: torch.Tensor) -> Noise:
    """Return how far a model whose linear weights are int8 by rows moves when sums are scaled and not weights."""
    plain, scaled = copy.deepcopy(model), copy.deepcopy(model)
    linear = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linear:
        layer = plain.get_submodule(name)
        scales = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        integers = (layer.weight / scales).round()
        layer.weight = torch.nn.Parameter(integers * scales)  # a tied embedding keeps its own, in both
        scaled.set_submodule(name, ScaledSums(integers, scales.flatten()))
    want, got = (each(input_ids=tokens, use_cache=False).logits[0] for each in (plain, scaled))
    return _noise(want, got)


def _noise(want: torch.Tensor, got: torch.Tensor) -> Noise:
    delta = (want.double() - got.double()).abs() / want.double().std()
    return Noise(delta.max().item(), delta.mean().item())


def permute_mlp(model: PreTrainedModel) -> None:
    """The model computes the same function, its MLP sums run in another order."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        parts = {name for name, _ in module.named_children()} | {name for name, _ in module.named_parameters(recurse=False)}
        if {"gate_proj", "up_proj", "down_proj"} <= parts:
            order = torch.randperm(module.down_proj.weight.shape[1], generator=generator)
            for projection in (module.gate_proj, module.up_proj):
                projection.weight.copy_(projection.weight[order])
            module.down_proj.weight.copy_(module.down_proj.weight[:, order])
        elif {"gate_up_proj", "down_proj"} <= parts:
            order = torch.randperm(module.down_proj.shape[2], generator=generator)
            module.gate_up_proj.copy_(module.gate_up_proj[:, torch.cat([order, order + len(order)])])
            module.down_proj.copy_(module.down_proj[:, :, order])
        elif {"c_fc", "c_proj"} <= parts:
            order = torch.randperm(module.c_proj.weight.shape[0], generator=generator)
            module.c_fc.weight.copy_(module.c_fc.weight[:, order])
            module.c_fc.bias.copy_(module.c_fc.bias[order])
            module.c_proj.weight.copy_(module.c_proj.weight[order])


def permute_heads(model: PreTrainedModel) -> None:
    """The model computes the same function, the output projection's sums over heads run in another order."""
    generator = torch.Generator().manual_seed(2)
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    for module in model.modules():
        parts = {name for name, _ in module.named_children()}
        order = torch.randperm(kv_heads, generator=generator)
        if {"q_proj", "k_proj", "v_proj", "o_proj"} <= parts:
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                projection.weight.copy_(projection.weight.unflatten(0, (kv_heads, -1))[order].flatten(0, 1))
            module.o_proj.weight.copy_(module.o_proj.weight.unflatten(1, (kv_heads, -1))[:, order].flatten(1, 2))
        elif {"c_attn", "c_proj"} <= parts:
            module.c_attn.weight.copy_(module.c_attn.weight.unflatten(1, (3, heads, -1))[:, :, order].flatten(1))
            module.c_attn.bias.copy_(module.c_attn.bias.unflatten(0, (3, heads, -1))[:, order].flatten())
            module.c_proj.weight.copy_(module.c_proj.weight.unflatten(0, (heads, -1))[order].flatten(0, 1))


def main() -> None:
    """Print one line a model and comparison kind, worst over the seeds."""
    parser = argparse.ArgumentParser(description="Print how far honest arithmetic moves logits, in σ.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str, int], dict[str, Noise]] = {}
    for kind, tiny, seed in models(asked.seeds):
        count = MANY_TOKENS if kind == "long" else TOKENS
        tokens = torch.randint(3, tiny.vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))
        row = rows.setdefault((kind, tiny.model_type, tiny.layers), {})
        model = built(kind, tiny, seed)
        found = measure(model, tokens) if asked.dtype == "float32" else measure_narrow(model, tokens, getattr(torch, asked.dtype))
        for name, noise in found.items():
            known = row.get(name, Noise(0.0, 0.0))
            row[name] = Noise(max(known.worst, noise.worst), max(known.mean, noise.mean))
    kinds = ("fp64", "mlp", "heads", "cached", "scaled") if asked.dtype == "float32" else ("whole", "mlp", "heads", "cached")
    print(f"| size | type | layers | worst (mean): {' | '.join(kinds)} |\n|{'---|' * (3 + len(kinds))}")
    for (kind, model_type, layers), row in rows.items():
        cells = " | ".join(f"{row[name].worst:.1e} ({row[name].mean:.0e})" for name in kinds)
        print(f"| {kind} | {model_type} | {layers} | {cells} |")


if __name__ == "__main__":
    main()
