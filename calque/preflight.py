"""What a conversion needs, said before it begins: bytes on disk and in memory, and bytes read for each token."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.bandwidth import bandwidth
from calque.console import size
from calque.doctor import total_memory
from calque.errors import SourceUnreadable, WeightMismatch, WontFit
from calque.facts import count_parameters
from calque.weights import PIECE_BYTES, emitted_bytes, torch_dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from calque.source import ModelSource
    from calque.traced import TracedModel

# Interpreter, torch, transformers and the exporter, resident once loaded: measured 430 MB on Linux with torch 2.13.
TOOLS_BYTES = 430 << 20
# Each node of the graph costs this much while it is traced and translated: measured on 2 to 48 layers.
NODE_BYTES = 40 << 10
# The runtime's own code and buffers, and the references of one scenario: measured 60 MB with onnxruntime 1.31.
RUNTIME_BYTES = 64 << 20
# Each node of the graph in the written file, and the manifest and report beside it.
NODE_FILE_BYTES = 160
RECORD_BYTES = 32 << 10
FP32 = 4
# Bytes for each pair of inputs of the widest product while it is calibrated: four matrices in float64, as GPTQ factors them.
MOMENT_COPIES = 32
# Pieces of weights: what is read, cast, quantized and packed of one at a time.
PIECE_COPIES = 4
# A block's weights as the runtime lays them out, and unpacked in float32, of 4 bits each.
BLOCK_COPIES = 10
SMALLEST_BLOCK = 8 << 20
# Positions that the conversations of the proof ask for at once, and how often their outputs are held.
PROOF_POSITIONS, ANSWER_COPIES = 256, 2
# The largest batch that the gate drives.
PROOF_ROWS = 5
# Of one weight, at most; what is packed has embeddings and heads in more.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "int8-static": 4, "int4": 4, "fp8": 4}
# No language model is nearly as deep; building even this many layers takes minutes.
MOST_LAYERS = 10_000
# What every model of transformers that has the setting needs at least one of.
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def require_sizes(config: PreTrainedConfig, path: Path) -> None:
    """Leave quietly if the sizes in a config can be those of a model; its code would fail late, or not at all.

    Raises:
        SourceUnreadable: every size that cannot be.
    """
    found = _sizes(config)
    wrong = [f"{name}: {size}  must be at least 1" for name, size in found.items() if size < 1]
    heads, groups = found.get("num_attention_heads", 1), found.get("num_key_value_heads", 1)
    if not wrong and heads % groups:
        wrong.append(f"num_key_value_heads: {groups}  must divide num_attention_heads: {heads}")
    if (layers := found.get("num_hidden_layers", 1)) > MOST_LAYERS:
        wrong.append(f"num_hidden_layers: {layers}  no model has more than {MOST_LAYERS}")
    if wrong:
        raise SourceUnreadable(f"{path} describes no {config.model_type} model", wrong, "check it against the model's documentation")


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Return the sizes that a config states in one number."""
    text = config.get_text_config(decoder=True)  # one of several, where a model has them
    # Not by getattr: a size that differs between layers refuses to be read for all of them.
    table = text.to_dict()
    sizes = {name: table.get(text.attribute_map.get(name, name)) for name in POSITIVE}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def require_disk(source: ModelSource, folder: Path, precision: str = "fp32") -> None:
    """Leave quietly if the weights in that precision fit on the disk of ``folder``.

    Raises:
        WontFit: how much is needed and how much is free.
    """
    elements = sum(math.prod(stored.shape) for stored in source.weights.values())
    takes, free = elements * BYTES[precision] + companion_bytes(source), shutil.disk_usage(folder).free
    if takes > free:
        raise WontFit(
            f"{source.id} needs {size(takes)} on disk, {size(free)} are free where the output goes",
            fix="free some space, or name a folder on another disk with -o",
        )


def companion_bytes(source: ModelSource) -> int:
    """Return the bytes of the files that are copied beside the weights."""
    return sum(path.stat().st_size for path in source.companion_files())


def require_tensors(source: ModelSource) -> None:
    """Leave quietly if the checkpoint can hold the layers and sizes that the config promises; building more would take forever.

    Raises:
        WeightMismatch: what the config promises, and what the checkpoint holds.
    """
    found = _sizes(source.config)
    longest = max((max(stored.shape, default=0) for stored in source.weights.values()), default=0)
    wrong = [
        f"{name}: {found[name]}  no tensor has an axis longer than {longest}"
        for name in ("vocab_size", "hidden_size")
        if found.get(name, 0) > longest
    ]
    if (layers := found.get("num_hidden_layers", 0)) > len(source.weights):
        wrong.append(f"num_hidden_layers: {layers}  there are {len(source.weights)} tensors in all")
    if wrong:
        fix = "check that config.json and the weights belong together, and that every shard is there"
        raise WeightMismatch(f"config.json of {source.id} promises what the checkpoint cannot hold", wrong, fix)


def cache_bytes(model: TracedModel) -> int:
    """Return what the slots of one row take, all layers together; 0 where the cache grows."""
    import torch

    fixed = [state for state in model.states if state.update == "in_place"]
    elements = [math.prod(size for size in state.shape if isinstance(size, int)) for state in fixed]
    return sum(count * getattr(torch, state.dtype).itemsize for count, state in zip(elements, fixed, strict=True))


def require_cache(model: TracedModel) -> None:
    """Leave quietly if the slots of the proof's largest batch fit into memory, before and after a call.

    Raises:
        WontFit: how much they take, and how much there is.
    """
    takes, total = 2 * PROOF_ROWS * cache_bytes(model), total_memory()
    if total is not None and takes > total:
        raise WontFit(
            f"a static cache of {model.limits.max_length} slots takes {size(takes)} in the proof, this machine has {size(total)}",
            fix="ask for fewer slots with --max-length",
        )


def sizes(model: TracedModel, beside: int = 0) -> dict[str, Any]:
    """Return parameters and bytes: weights, artifact, disk, predicted peak memory; and how fast decoding can be at best.

    ``beside``: the bytes of companions and references.
    """
    weights = model.weights.nbytes() - _halved(model)
    nodes = len(model.graph.nodes)
    artifact = weights + beside + NODE_FILE_BYTES * nodes + RECORD_BYTES
    return {
        "parameters": count_parameters(model),
        "weights_bytes": weights,
        "artifact_bytes": artifact,
        "disk_bytes": artifact,
        "peak_memory_bytes": peak_memory(model),
        **(_decoding(model, weights) if model.states else {}),
    }


def _halved(model: TracedModel) -> int:
    """Return the bytes that integers of 4 bits save when they are written, two in one."""
    from calque.traced import four_bit_parameters

    return sum(math.prod(model.weights[name].shape) for name in four_bit_parameters(model)) // 2


def peak_memory(model: TracedModel) -> dict[str, int]:
    """Return the peak resident bytes of converting, of proving, and of proving by blocks as small as they can be."""
    # What has no rows of its own is held as it is stored, cast and transposed.
    whole = max((math.prod(weight.shape) * FP32 for weight in model.weights.distinct() if not weight.by_rows), default=0)
    # Proving holds the eager model, then the runtime's copy, both in float32: where its kernels know no narrower type, ONNX Runtime
    # casts weights when it opens the file.
    tools = TOOLS_BYTES + NODE_BYTES * len(model.graph.nodes)
    runs = tools + RUNTIME_BYTES + 2 * PROOF_ROWS * cache_bytes(model)
    answers = ANSWER_COPIES * PROOF_POSITIONS * FP32 * max((s for o in model.outputs if isinstance(s := o.shape[-1], int)), default=0)
    return {
        "convert": tools + max(3 * whole, PIECE_COPIES * PIECE_BYTES) + _calibration_bytes(model),
        "prove": runs + 2 * _wide_bytes(model),
        "prove_by_blocks": runs + answers + max(3 * whole, PIECE_COPIES * PIECE_BYTES, BLOCK_COPIES * smallest_block(model)),
    }


def _calibration_bytes(model: TracedModel) -> int:
    """Return what measuring the model on its rows of text takes: the rows, before and after a layer, its weights, its second moments."""
    widths = [weight.shape[-1] for weight in model.replaced.values()]
    if not model.samples or not widths:
        return 0
    rows = 2 * sum(map(len, model.samples)) * min(widths) * FP32
    layer = sum(math.prod(weight.shape) for weight in model.replaced.values()) // max(model.layers, 1) * FP32
    return rows + layer + MOMENT_COPIES * max(widths) ** 2


def smallest_block(model: TracedModel) -> int:
    """Return the bytes of weights that the proof must at least hold at a time: of the largest that is not read by rows."""
    sizes = [emitted_bytes(weight) for weight in model.weights.distinct() if torch_dtype_name(weight) != "uint8"]
    return max(SMALLEST_BLOCK, *sizes, 0)


def _wide_bytes(model: TracedModel) -> int:
    """Return the bytes of the untouched model in float32; of weights that are integers now, what they stand for counts."""
    unique = {id(weight): weight for name, weight in model.weights.entries.items() if not _of_integers(name, model)}
    # Tied names stand for weights of one shape: they are counted once each, which errs on the safe side.
    whole = sum(math.prod(weight.shape) for weight in unique.values())
    return FP32 * (whole + sum(math.prod(weight.shape) for weight in model.replaced.values()))


def _of_integers(name: str, model: TracedModel) -> bool:
    """Return whether a parameter is made of the integers, scales or zero points of one that was replaced."""
    return any(name.startswith(f"{replaced}.") for replaced in model.replaced)


def _decoding(model: TracedModel, weights: int) -> dict[str, Any]:
    """Return what one token reads. Every weight once, so no runtime on this machine decodes one sequence faster."""
    per_token = weights - _looked_up(model)
    return {"decode_bytes_per_token": per_token, "decode_tokens_per_s_at_best": round(bandwidth() / per_token, 1)}


def _looked_up(model: TracedModel) -> int:
    """Return the bytes of tables that a token reads one row of: embeddings that no product reads as well."""
    import torch

    total = 0
    for name, node in model.parameters().items():
        users = {user.target for user in node.users}
        if users and users <= {torch.ops.aten.embedding.default, torch.ops.calque.packed_embedding.default}:
            total += emitted_bytes(model.weights[name])
    return total
