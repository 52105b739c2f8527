"""What a conversion needs, said before it begins: bytes on disk and in memory, and bytes read for each token."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.errors import WeightMismatch, WontFit

if TYPE_CHECKING:
    from calque.source import ModelSource
    from calque.traced import TracedModel

# Interpreter, torch, transformers and the exporter, resident once loaded: measured 430 MB on Linux with torch 2.13.
TOOLS_BYTES = 430 << 20
# Each node of the graph costs this much while it is traced and translated: measured on 2 to 48 layers.
NODE_BYTES = 40 << 10
# Tokenizer, config, graph and references beside the weights.
COMPANION_BYTES = 16 << 20
FP32 = 4
BANDWIDTH_BYTES = 256 << 20


def require_disk(source: ModelSource, folder: Path) -> None:
    """Leave quietly if the weights in fp32 fit on the disk of ``folder``.

    Raises:
        WontFit: how much is needed and how much is free.
    """
    elements = sum(math.prod(stored.shape) for stored in source.tensors.values())
    needed, free = elements * FP32 + COMPANION_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise WontFit(
            f"{source.id} needs {needed / 1e9:.2f} GB on disk, {free / 1e9:.2f} GB are free where the output goes",
            fix="free some space, or name a folder on another disk with -o",
        )


def require_tensors(source: ModelSource) -> None:
    """Leave quietly if the checkpoint can hold as many layers as the config promises; building more would take forever.

    Raises:
        WeightMismatch: how many layers, and how many tensors.
    """
    layers = getattr(source.config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(source.tensors):
        raise WeightMismatch(
            f"config.json of {source.id} promises {layers} layers, and the checkpoint holds {len(source.tensors)} tensors in all",
            fix="check that config.json and the weights belong together, and that every shard is there",
        )


def sizes(model: TracedModel) -> dict[str, Any]:
    """Return parameters and bytes: weights, artifact, disk, predicted peak memory; and how fast decoding can be at best."""
    unique = {id(weight): (name, weight) for name, weight in model.weights.entries.items()}.values()
    elements = {name: math.prod(weight.shape) for name, weight in unique}
    weights = model.weights.nbytes()
    largest = max(elements.values(), default=0) * FP32
    # Converting holds one tensor, its cast and its transpose; proving holds the eager model, then the runtime's copy.
    converting = TOOLS_BYTES + NODE_BYTES * len(model.graph.nodes) + 3 * largest
    return {
        "parameters": sum(elements.values()),
        "weights_bytes": weights,
        "artifact_bytes": weights + COMPANION_BYTES,
        "disk_bytes": weights + COMPANION_BYTES,
        "peak_memory_bytes": {"convert": converting, "prove": TOOLS_BYTES + 2 * weights},
        **(_decoding(model, weights) if model.states else {}),
    }


def _decoding(model: TracedModel, weights: int) -> dict[str, Any]:
    """Return what one token reads. Every weight once, so no runtime on this machine decodes one sequence faster."""
    per_token = weights - _looked_up(model)
    return {"decode_bytes_per_token": per_token, "decode_tokens_per_s_at_best": round(bandwidth() / per_token, 1)}


def bandwidth() -> float:
    """Return the bytes per second at which this machine reads memory, measured now on a block larger than its caches."""
    import torch

    block = torch.ones(BANDWIDTH_BYTES // FP32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return BANDWIDTH_BYTES / best


def _looked_up(model: TracedModel) -> int:
    """Return the bytes of tables that a token reads one row of: embeddings that no product reads as well."""
    import torch

    total = 0
    for name, node in model.parameters().items():
        users = {user.target for user in node.users}
        if users == {torch.ops.aten.embedding.default}:
            total += math.prod(model.weights[name].shape) * FP32
    return total
