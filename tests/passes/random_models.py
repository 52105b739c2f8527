"""Small random decoders, traced by torch.export: what passes and lowerings must hold for, not only the models that exist.

A model is an embedding, blocks of linear layers with and without bias (some of them sharing a weight), norms, activations
and residuals, key and value states where asked for, and a head that may be tied to the embedding or scaled and capped.
"""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from calque import checkpoint, ops  # noqa: F401  # registers torch.ops.calque
from calque.artifact import Limits, TensorSpec
from calque.states import key_value_states
from calque.traced import TracedModel
from calque.weights import WeightTable

HEADS = 2
_FOLDER = Path(tempfile.mkdtemp(prefix="random-models-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Block:
    """One block: what it computes, and whether it is added to what it was given."""

    activation: str
    norm: str
    bias: bool
    residual: bool
    shares: bool
    state: bool


@dataclass(frozen=True)
class Shape:
    """A whole model; ``extra`` gives the hidden states as a second output."""

    hidden: int
    vocabulary: int
    blocks: tuple[Block, ...]
    tied: bool
    head_bias: bool
    scale: float
    softcap: bool
    extra: bool
    seed: int


BLOCKS = st.builds(
    Block,
    activation=st.sampled_from(["relu", "silu", "gelu", "tanh", "none"]),
    norm=st.sampled_from(["layer", "rms", "none"]),
    bias=st.booleans(), residual=st.booleans(), shares=st.booleans(), state=st.booleans(),
)  # fmt: skip
SHAPES = st.builds(
    Shape,
    hidden=st.sampled_from([4, 8, 12]), vocabulary=st.integers(5, 17), blocks=st.lists(BLOCKS, min_size=1, max_size=3).map(tuple),
    tied=st.booleans(), head_bias=st.booleans(), scale=st.sampled_from([1.0, 0.5]), softcap=st.booleans(), extra=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip


class _Layer(nn.Module):
    def __init__(self, block: Block, hidden: int, index: int, shared: nn.Linear) -> None:
        super().__init__()
        self.block, self.index, self.hidden = block, index, hidden
        self.linear = shared if block.shares else nn.Linear(hidden, hidden, bias=block.bias)
        norms: dict[str, nn.Module] = {"layer": nn.LayerNorm(hidden), "rms": nn.RMSNorm(hidden, eps=1e-6), "none": nn.Identity()}
        self.norm = norms[block.norm]
        if block.state:
            self.key, self.value = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=block.bias)

    def forward(self, x: Tensor, past: list[Tensor]) -> Tensor:
        y = self.linear(self.norm(x))
        y = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu, "tanh": torch.tanh}.get(
            self.block.activation, lambda same: same
        )(y)
        if self.block.state:
            split = (x.shape[0], x.shape[1], HEADS, self.hidden // HEADS)
            key = torch.ops.calque.cache_update(past[0], self.key(x).view(split).transpose(1, 2), f"{self.index}.key")
            value = torch.ops.calque.cache_update(past[1], self.value(x).view(split).transpose(1, 2), f"{self.index}.value")
            query = y.view(split).transpose(1, 2)
            seen = torch.ops.calque.attention(query, key, value, None, self.hidden**-0.5, 0.0, None, True)
            y = seen.transpose(1, 2).reshape(x.shape)
        out: Tensor = x + y if self.block.residual else y
        return out


class _Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        shared = nn.Linear(shape.hidden, shape.hidden)
        self.layers = nn.ModuleList(_Layer(block, shape.hidden, i, shared) for i, block in enumerate(shape.blocks))
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=shape.head_bias)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, *past: Tensor) -> Any:
        x, taken = self.embed(input_ids), 0
        for layer in self.layers:
            states = list(past[taken : taken + 2]) if layer.block.state else []  # type: ignore[union-attr]
            taken += len(states)
            x = layer(x, states)
        logits = self.head(x)
        if self.shape.scale != 1:
            logits = logits * self.shape.scale
        if self.shape.softcap:
            logits = torch.tanh(logits / 5.0) * 5.0
        return (logits, x) if self.shape.extra else (logits,)


def trace(shape: Shape) -> TracedModel:
    """The model's trace; its weights lie in a file, and tied ones are one entry."""
    torch.manual_seed(shape.seed)
    module = _Decoder(shape).eval().requires_grad_(False)
    file = _FOLDER / f"{next(_NUMBERS)}" / "model.safetensors"
    file.parent.mkdir()
    unique = {tensor.data_ptr(): name for name, tensor in reversed(list(module.state_dict(keep_vars=True).items()))}
    save_file({name: module.state_dict()[name].contiguous() for name in unique.values()}, file)
    stored = checkpoint.read_headers(file.parent)
    keeping = [i for i, block in enumerate(shape.blocks) if block.state]
    size = shape.hidden // HEADS
    past = [torch.randn(2, HEADS, 3, size) for _ in range(2 * len(keeping))]
    batch, sequence, before = Dim("batch_size", max=64), Dim("sequence_length", max=64), Dim("past_sequence_length", max=64)
    dynamic: tuple[Any, ...] = ({0: batch, 1: sequence}, *([tuple({0: batch, 2: before} for _ in past)] if past else []))
    program = torch.export.export(module, (torch.ones(2, 5, dtype=torch.int64), *past), dynamic_shapes=dynamic, strict=False)
    held = {name: stored[unique[tensor.data_ptr()]] for name, tensor in module.state_dict(keep_vars=True).items()}
    specs = [spec for spec in program.graph_signature.input_specs if spec.target is not None]
    required = {str(spec.target): tuple(held[str(spec.target)].shape) for spec in specs}
    states = tuple(state for i in keeping for state in key_value_states(i, HEADS, size, size, None))
    outputs = [TensorSpec("logits", "float32", ("batch_size", "sequence_length", shape.vocabulary))]
    if shape.extra:
        outputs.append(TensorSpec("hidden", "float32", ("batch_size", "sequence_length", shape.hidden)))
    return TracedModel(
        program=program,
        weights=WeightTable({name: held[name] for name in required}, required, available=tuple(stored), origin="a random model"),
        states=states,
        inputs=(
            TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
            *(TensorSpec(state.input, "float32", state.shape) for state in states),
        ),
        outputs=tuple(outputs),
        limits=Limits(),
    )


def feeds(model: TracedModel, shape: Shape, batch: int, sequence: int, past: int) -> dict[str, NDArray[Any]]:
    """Random inputs of those lengths."""
    chance = np.random.default_rng(shape.seed)
    inputs: dict[str, NDArray[Any]] = {"input_ids": chance.integers(0, shape.vocabulary, (batch, sequence))}
    for state in model.states:
        inputs[state.input] = chance.normal(size=(batch, HEADS, past, shape.hidden // HEADS)).astype(np.float32)
    return inputs
