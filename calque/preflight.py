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
from calque.weights import PIECE_BYTES, Stored, emitted_bytes, torch_dtype_name

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
# How often the largest weight of a block is in memory beside the block: laid out for the kernels and, of 8 bits, in float32.
LARGEST_COPIES, WIDE_LARGEST_COPIES = 4, 2
SMALLEST_BLOCK = 8 << 20
# Positions that the conversations of the proof ask for at once; blocks put together what parts of a product gave.
PROOF_POSITIONS, PART_COPIES = 256, 2
# The largest batch that the gate drives.
PROOF_ROWS = 5
# Of one weight, at least: scales come on top, and what no product reads stays wide.
LEAST_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "int8-static": 1, "int4": 0.5, "fp8": 1}
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
    """Leave quietly if the weights in that precision can fit on the disk of ``folder``; how large they are is known after the passes.

    Raises:
        WontFit: how much is needed at least and how much is free.
    """
    elements = sum(math.prod(stored.shape) for stored in source.weights.values())
    _require_free(math.ceil(elements * LEAST_BYTES[precision]) + companion_bytes(source), source.id, folder)


def require_room(model: TracedModel, source: ModelSource, folder: Path) -> None:
    """Leave quietly if the weights as they will be emitted, and what they are made of, fit on the disk of ``folder``.

    Raises:
        WontFit: how much is needed and how much is free.
    """
    _require_free(artifact_bytes(model) + companion_bytes(source) + integers_bytes(model), source.id, folder)


def _require_free(takes: int, name: str, folder: Path) -> None:
    if takes > (free := shutil.disk_usage(folder).free):
        raise WontFit(
            f"{name} needs {size(takes)} on disk, {size(free)} are free where the output goes",
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
    config = source.config
    if source.task.of_images:  # whatever else its type can do: no text, no tokens
        config = getattr(config, "vision_config", config)
    found = _sizes(config)
    longest = max((max(stored.shape, default=0) for stored in source.weights.values()), default=0)
    wrong = [
        f"{name}: {found[name]}  no tensor has an axis longer than {longest}"
        for name in (("hidden_size",) if source.task.of_images else ("vocab_size", "hidden_size"))
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


def sizes(model: TracedModel, beside: int = 0, working: int = 0, mapped: int = 0, block: int = 0, writes: int = 0) -> dict[str, Any]:
    """Return parameters and bytes: weights, artifact, disk, predicted peak memory; and how fast decoding can be at best.

    ``beside``: the bytes of companions and references. ``working``: of what is on the same disk until the conversion ends.
    ``mapped``, ``block``, ``writes``: as `peak_memory` takes them.
    """
    artifact = artifact_bytes(model) + beside
    return {
        "parameters": count_parameters(model),
        "weights_bytes": weights_bytes(model),
        "artifact_bytes": artifact,
        "disk_bytes": artifact + working,
        "peak_memory_bytes": peak_memory(model, mapped, block, writes),
        **(_decoding(model) if model.states else {}),
    }


def artifact_bytes(model: TracedModel) -> int:
    """Return the bytes of the artifact's graph and weights, its manifest and its report."""
    return weights_bytes(model) + NODE_FILE_BYTES * len(model.graph.nodes) + RECORD_BYTES


def weights_bytes(model: TracedModel) -> int:
    """Return the bytes of the weights as they are written."""
    return model.weights.nbytes() - _halved(model)


def _halved(model: TracedModel) -> int:
    """Return the bytes that integers of 4 bits save when they are written, two in one."""
    from calque.traced import four_bit_parameters

    return sum(math.prod(model.weights[name].shape) for name in four_bit_parameters(model)) // 2


def integers_bytes(model: TracedModel) -> int:
    """Return what the integers take on disk that a conversion keeps until it ends; calibrated ones are there twice."""
    made = {id(weight): weight for name, weight in model.weights.entries.items() if _of_integers(name, model)}
    return (sum(map(emitted_bytes, made.values())) - _halved(model)) * (2 if model.samples else 1)


def mapped_bytes(source: ModelSource) -> int:
    """Return the bytes of the checkpoint that lie in memory beside the float32 model while that is loaded."""
    return sum(weight.nbytes for weight in source.weights.values() if isinstance(weight, Stored) and weight.dtype != "F32")


def peak_memory(model: TracedModel, mapped: int = 0, block: int = 0, writes: int = 0) -> dict[str, int]:
    """Return the peak resident bytes of converting, of proving, and of proving by blocks.

    ``mapped``: as `mapped_bytes` says. ``block``: of how many bytes of weights blocks are; as small as they can be where that is less.
    ``writes``: what writing the file takes where all weights are in memory for it.
    """
    # What has no rows of its own is held as it is stored, cast and transposed.
    whole = max((math.prod(weight.shape) * FP32 for weight in model.weights.distinct() if not weight.by_rows), default=0)
    tools = TOOLS_BYTES + NODE_BYTES * len(model.graph.nodes)
    runs = tools + RUNTIME_BYTES + 2 * PROOF_ROWS * cache_bytes(model)
    answers = PROOF_POSITIONS * FP32 * max((s for o in model.outputs if isinstance(s := o.shape[-1], int)), default=0)
    return {
        "convert": tools + max(3 * whole, PIECE_COPIES * PIECE_BYTES, writes) + _calibration_bytes(model),
        # The eager model is gone before the artifact is opened.
        "prove": max(tools + _wide_bytes(model) + mapped, runs + answers + _opened_bytes(model)),
        "prove_by_blocks": runs
        + PART_COPIES * answers
        + max(3 * whole, PIECE_COPIES * PIECE_BYTES, block_memory(model, max(block, smallest_block(model)))),
    }


def _opened_bytes(model: TracedModel) -> int:
    """Return what the runtime holds of the weights: the file, floats in float32, and in another order tables that products read too.

    An artifact of integers is opened a second time, without rounding.
    """
    import torch

    products: dict[int, set[Any]] = {}
    for name, node in model.parameters().items():
        products.setdefault(id(model.weights[name]), set()).update(user.target for user in node.users)
    total = weights_bytes(model) * (2 if model.replaced else 1)
    for weight in model.weights.distinct():
        wide = FP32 * math.prod(weight.shape)
        users = products.get(id(weight), set())
        if torch_dtype_name(weight) in ("float16", "bfloat16"):
            total += wide
        if torch.ops.aten.embedding.default in users and len(users) > 1 and getattr(torch, torch_dtype_name(weight)).is_floating_point:
            total += wide
    return total


def _calibration_bytes(model: TracedModel) -> int:
    """Return what measuring the model on its rows of text takes: the rows, before and after a layer, its weights, its second moments."""
    widths = [weight.shape[-1] for weight in model.replaced.values()]
    if not model.samples or not widths:
        return 0
    rows = 2 * sum(map(len, model.samples)) * min(widths) * FP32
    layer = sum(math.prod(weight.shape) for weight in model.replaced.values()) // max(model.layers, 1) * FP32
    return rows + layer + MOMENT_COPIES * max(widths) ** 2


def block_memory(model: TracedModel, block: int) -> int:
    """Return the bytes that running blocks of ``block`` bytes of weights takes; of a larger weight a block has some rows."""
    copies, largest = _largest(model)
    return min(block, weights_bytes(model)) + copies * min(block, largest)


def block_for(model: TracedModel, memory: int) -> int:
    """Return how large blocks may be that take so much memory, the other way round."""
    copies, largest = _largest(model)
    return max(memory // (1 + copies), memory - copies * largest)


def _largest(model: TracedModel) -> tuple[int, int]:
    """Return how often the largest weight of a block is in memory beside it, and the bytes of the model's largest."""
    distinct = model.weights.distinct()
    wide = all(torch_dtype_name(weight) in ("float32", "int64", "bool") for weight in distinct)
    return (WIDE_LARGEST_COPIES if wide else LARGEST_COPIES), max(map(emitted_bytes, distinct), default=0)


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


def _decoding(model: TracedModel) -> dict[str, Any]:
    """Return what one token reads. Every weight once, so no runtime on this machine decodes one sequence faster."""
    per_token = weights_bytes(model) - _looked_up(model)
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
