"""An eager Hugging Face model behind the names of an artifact, so that the gate can be tried before any target exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from calque.artifact import Artifact, GraphSpec, Limits, TensorSpec
from calque.runtime.limits import check_limits
from calque.states import StateSpec, key_value_states

Array = NDArray[np.generic]


@dataclass
class EagerSession:
    """Masks are built here from true positions: transformers' own go by cache index, which right padding makes wrong.

    ``window_error`` is added to every sliding window: a fault to be caught. ``logits``: all or last.
    """

    model: PreTrainedModel
    limits: Limits = field(default_factory=Limits)
    window_error: int = 0
    logits: str = "all"

    def __call__(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_limits(self.limits, inputs)
        if self.limits.recompute_at is None:
            return self._forward(inputs)
        # Eager picks longrope's frequencies by the longest row of the batch; each row must have its own.
        shared = {name: array for name, array in inputs.items() if array.ndim == 0}
        batch = len(inputs["input_ids"])
        rows = [self._forward({**{n: a[r : r + 1] for n, a in inputs.items() if a.ndim}, **shared}) for r in range(batch)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _forward(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        layers = sorted({int(name.split(".")[1]) for name in arrays if name.startswith("past_key_values.")})
        past = [(arrays[f"past_key_values.{i}.key"], arrays[f"past_key_values.{i}.value"]) for i in layers]
        cache = DynamicCache(past)
        with torch.inference_mode():
            out: Any = self.model(
                input_ids=arrays["input_ids"],
                attention_mask=self._masks(arrays["attention_mask"], arrays["input_ids"].shape[1]),
                position_ids=arrays["position_ids"],
                past_key_values=cache,
                use_cache=True,
            )
        keep = int(arrays["num_logits_to_keep"]) if "num_logits_to_keep" in arrays else int(self.logits == "last")
        outputs = {"logits": out.logits[:, -keep:].numpy()}
        for i, (key, value, *_) in enumerate(cache):
            outputs[f"present.{i}.key"], outputs[f"present.{i}.value"] = key.numpy(), value.numpy()
        return outputs

    def _masks(self, mask: torch.Tensor, new: int) -> Any:
        positions = mask.cumsum(1) - 1
        query, key = positions[:, -new:, None], positions[:, None, :]
        own = torch.eye(mask.shape[1], dtype=torch.bool)[-new:]
        full = (mask[:, None, :].bool() & (key <= query)) | own
        masks = {"full_attention": full}
        window = getattr(self.model.config, "sliding_window", None)
        if window:
            masks["sliding_attention"] = (full & (query - key < window + self.window_error)) | own
        floats = {kind: torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None] for kind, seen in masks.items()}
        if getattr(self.model.config, "layer_types", None) and self.model.config.model_type != "mixtral":
            return floats
        return floats["sliding_attention" if window else "full_attention"]


def windows_of(config: Any) -> list[int | None]:
    """The sliding window of each layer, None where it sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def artifact_of(model: PreTrainedModel, limits: Limits, folder: Path, keep_input: bool = False) -> Artifact:
    """An artifact that describes the model; the folder holds no file of it."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states: list[StateSpec] = []
    for layer, window in enumerate(windows_of(config)):
        states += key_value_states(layer, heads, size, size, window)
    inputs = [
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
        TensorSpec("position_ids", "int64", ("batch_size", "sequence_length")),
        *([TensorSpec("num_logits_to_keep", "int64", ())] if keep_input else []),
        *(TensorSpec(state.input, state.dtype, state.shape) for state in states),
    ]
    outputs = [TensorSpec("logits", "float32", ("batch_size", "sequence_length", config.vocab_size))]
    outputs += [TensorSpec(s.output, s.dtype, (*s.shape[:2], "total_sequence_length", s.shape[3])) for s in states]
    return Artifact(
        folder=folder,
        target="eager",
        recipe={},
        source={},
        precision="fp32",
        files={},
        graphs={"model": GraphSpec("model.onnx", tuple(inputs), tuple(outputs))},
        states=tuple(states),
        passes={},
        tools={},
        limits=limits,
    )
