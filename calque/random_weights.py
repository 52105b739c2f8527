"""Seeded random weights whose faults show, written as safetensors without ever holding the model."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from calque.console import size
from calque.errors import SourceUnreadable, Unsupported, WontFit
from calque.fake import buildable, fake_parameters
from calque.tasks import TASKS, Task
from calque.weights import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The model's own initialization (std 0.02, unit norms, zero biases) hides faults: attention is uniform, so a wrong mask
# or position changes next to nothing, and a dropped bias or norm weight nothing at all. With these values the attention
# entropy of twelve decoder families is at most 0.60 of uniform, and float32 is within 1.2e-5 σ of float64 (2 to 4 layers).
GAIN = 1.1
# Norm weights sit at the model's own value + 0.5: that sharpens queries and keys, normalized ones (qwen3) included,
# without a list of their names, and tells `w` from `1 + w`.
NORM_OFFSET = 0.5
SPREAD = 0.2
# Buffers that a batch norm computes with, which a model that was never trained has at 0 and 1: either would be missed by nobody.
STATISTICS = {"running_mean": 0.0, "running_var": NORM_OFFSET}
# Embeddings have unit norm, not unit elements: a residual stream that the input token dominates (gemma multiplies it by
# √hidden) makes a tied head repeat the input whatever attention does.
EMBEDDING_GAIN = 1.0

# Elements drawn at a time. It bounds memory and fits the cache; another size may give other bytes.
PIECE = 1 << 18

CAUSAL = TASKS["text-generation-with-past"]


def write_random_weights(
    config: PreTrainedConfig,
    folder: Path,
    seed: int = 0,
    *,
    task: Task = CAUSAL,
    trust_remote_code: bool = False,
    values: bool = True,
) -> Path:
    """``folder/model.safetensors`` holds random values for every parameter of the config's model of ``task``; return its path.

    Without ``values`` matrices are zeros that take no room on disk: enough to read names, shapes and dtypes.

    Each tensor is drawn from a generator seeded by ``(seed, name)`` and written in pieces: memory stays bounded by one
    piece whatever the model's size, and the bytes are the same on each run. Names are the module's own (tied ones once,
    under the name the others are tied to), dtypes those of ``config.dtype`` (float32 if unset).

    - matrices: N(0, (GAIN / √fan_in)²); embeddings: N(0, (EMBEDDING_GAIN / √size)²)
    - vectors: the model's own initial value (ones, or zeros where the model adds 1) + SPREAD · N(0, 1), and NORM_OFFSET
      unless it is a bias
    - other persistent buffers than the STATISTICS of batch norms, which are vectors, and integers: the model's own values

    Raises:
        SourceUnreadable: the config gives a tensor no elements.
        WontFit: there is no room for them in ``folder``.

    Source: safetensors format, README@0.8.
    """
    model = _outline(config, seed, task, trust_remote_code)
    tensors = _tensors(model)
    _require_elements(tensors)
    if values:
        _require_room(tensors, folder)
    # Larger elements first, as safetensors' own writer does, keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    path = folder / "model.safetensors"
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as file:
        file.write(_header({name: tensors[name] for name in order}))
        for name in order:
            # Vectors are always drawn: a pass may ask whether one is zero.
            if values or tensors[name].ndim < 2:
                for piece in _draw(_Law.of(model, name, tensors[name]), name, seed):
                    _write(file, piece)
            else:
                file.seek(tensors[name].nbytes, os.SEEK_CUR)
        file.truncate()
    # In one step: who has mapped an earlier file keeps its bytes, and an interrupted run leaves none that looks whole.
    partial.replace(path)
    return path


def _outline(config: PreTrainedConfig, seed: int, task: Task, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model with fake matrices and real vectors, the latter as the model itself initializes them."""
    import transformers

    def stay_real(param: torch.nn.Parameter) -> bool:
        return param.ndim <= 1 or not param.is_floating_point()

    with buildable(config), torch.random.fork_rng(devices=[]), fake_parameters(FakeTensorMode(), stay_real):
        torch.manual_seed(seed)
        # A copy: building writes the resolved dtype and attention implementation into the config.
        model: PreTrainedModel = getattr(transformers, task.class_for(config)).from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
    return model


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what a checkpoint of the model holds, by name: parameters and persistent buffers, tied ones once."""
    state = model.state_dict(keep_vars=True)
    skipped = set(model._keys_to_ignore_on_save or ())
    # The name that others are tied to comes first, so that it is the one that stays.
    names = sorted((name for name in state if name not in skipped), key=lambda name: name in model.all_tied_weights_keys)
    first = {id(state[name]): name for name in reversed(names)}
    return {name: state[name] for name in names if first[id(state[name])] == name}


def _require_elements(tensors: dict[str, torch.Tensor]) -> None:
    parameters = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter)}
    if empty := [f"{name}: {list(tensor.shape)}" for name, tensor in parameters.items() if not tensor.numel()]:
        raise SourceUnreadable("config.json gives parameters no elements", empty, "check its sizes against the model's documentation")


def _require_room(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    takes, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if takes > free:
        fix = "free some space there, or make the model smaller"
        raise WontFit(f"random weights take {size(takes)}, {size(free)} are free in {folder}", fix=fix)


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    names = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
    entries: dict[str, dict[str, object]] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.itemsize
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    # transformers refuses a file whose metadata does not name the framework.
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Law:
    """How one tensor is drawn: ``own + std · N(0, 1)``, ``own`` being values or one number."""

    own: torch.Tensor | float
    std: float
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: torch.nn.Module, name: str, tensor: torch.Tensor) -> _Law:
        prefix, _, attribute = name.rpartition(".")
        module = model.get_submodule(prefix)
        shape = tuple(tensor.shape)
        if attribute in STATISTICS and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            return cls(tensor.detach().float() + STATISTICS[attribute], SPREAD, shape, tensor.dtype)
        if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            if isinstance(tensor, FakeTensor):
                fix = "name a checkpoint with its weights"
                raise Unsupported(f"{name} is computed from the weights while the model is built, so random ones would not fit it", fix=fix)
            return cls(tensor.detach(), 0.0, shape, tensor.dtype)
        if tensor.ndim <= 1:
            offset = 0.0 if "bias" in attribute else NORM_OFFSET
            return cls(tensor.detach().float() + offset, SPREAD, shape, tensor.dtype)
        gain = EMBEDDING_GAIN if isinstance(module, torch.nn.Embedding) else GAIN
        std = gain / math.sqrt(_fan_in(module, shape))
        return cls(0.0, std, shape, tensor.dtype)


def _fan_in(module: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """Return how many inputs each output sums over."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):  # stores [in, out]
        return shape[0]
    if len(shape) == 2:
        return shape[1]
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return math.prod(shape[1:])
    # Stacked experts: some models store [experts, out, in], others [experts, in, out]; the geometric mean suits both.
    return math.sqrt(shape[-1] * shape[-2])


def _draw(law: _Law, name: str, seed: int) -> Iterator[torch.Tensor]:
    """Yield the tensor's values in order, flat, at most PIECE at a time."""
    if law.std == 0.0:
        assert isinstance(law.own, torch.Tensor)
        yield law.own.contiguous().flatten()
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    total = math.prod(law.shape)
    for start in range(0, total, PIECE):
        count = min(PIECE, total - start)
        own = law.own.flatten()[start : start + count] if isinstance(law.own, torch.Tensor) else law.own
        yield torch.randn(count, generator=generator).mul_(law.std).add_(own).to(law.dtype)


def _write(file: IO[bytes], values: torch.Tensor) -> None:
    # numpy has no bfloat16, so the values go out as the bytes they are.
    file.write(values.reshape(-1).view(torch.uint8).numpy().data)
