"""Tiny checkpoints in the formats of quantizers, packed number by number as the formats are described, with loops that can be read.

Each writer takes a folder that holds a float checkpoint and leaves a quantized one. The numbers that its weights stand for are worked
out here on their own, in ``Written``, so that what reads the formats is compared with something it shares no code with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.tiny_models import Tiny, eager_model

Numbers = NDArray[Any]
FILE = "model.safetensors"
# Every axis of a product is a multiple of 32, as GPTQ and AWQ want it.
LLAMA = Tiny("llama", hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocabulary=224)
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


@dataclass
class Written:
    """What was written: signed integers, scales and zero points [out, groups] of the weights that have them, and all numbers."""

    folder: Path
    integers: dict[str, Numbers] = field(default_factory=dict)
    numbers: dict[str, Numbers] = field(default_factory=dict)


def words_of(numbers: Numbers, bits: int) -> Numbers:
    """Return unsigned numbers [rows, count] as int32 words, each number's lowest bit first, without gaps."""
    every_bit = (numbers[:, :, None].astype(np.int64) >> np.arange(bits)) & 1
    stream = every_bit.reshape(len(numbers), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream.astype(np.uint8), axis=1, bitorder="little").view("<i4")


def rounded(weight: Numbers, bits: int, group: int, symmetric: bool, index: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Return unsigned integers [out, in], fp16 scales and unsigned zero points [out, groups], plain round to nearest."""
    q, count = np.zeros(weight.shape, np.int64), int(index.max()) + 1
    scales, zeros = np.zeros((len(weight), count), np.float16), np.zeros((len(weight), count), np.int64)
    largest, middle = (1 << bits) - 1, 1 << (bits - 1)
    for number in range(count):
        part = weight[:, index == number]
        if symmetric:
            scale = np.abs(part).max(1) / (middle - 1)
            zero = np.full(len(weight), middle)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / largest
            zero = np.round(-low / scale).astype(np.int64)
        scales[:, number], zeros[:, number] = scale, zero
        exact = scales[:, number].astype(np.float64)[:, None]
        q[:, index == number] = np.clip(np.round(part / exact) + zero[:, None], 0, largest)
    return q, scales, zeros


def base(folder: Path, tiny: Tiny = LLAMA) -> dict[str, Numbers]:
    """``folder`` holds the float checkpoint; return its tensors."""
    eager_model(tiny).save_pretrained(folder)
    return {name: tensor.numpy() for name, tensor in load_file(folder / FILE).items()}


PRODUCTS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
HEAD = "lm_head.weight"


def finish(written: Written, tensors: dict[str, Numbers | torch.Tensor], settings: dict[str, Any]) -> Written:
    """The folder holds the tensors, and a config that says how they were quantized."""
    made = {name: torch.from_numpy(np.array(t, order="C")) if isinstance(t, np.ndarray) else t for name, t in tensors.items()}
    save_file(made, written.folder / FILE, {"format": "pt"})
    path = written.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return written


def each(
    folder: Path,
    settings: dict[str, Any],
    pack: Callable[[str, Numbers, Written], dict[str, Any]],
    products: tuple[str, ...] = PRODUCTS,
    tiny: Tiny = LLAMA,
) -> Written:
    """Write a checkpoint whose products ``pack`` turned into tensors by suffix; what is no product is stored as fp16."""
    written, tensors = Written(folder), dict[str, Any]()
    for name, weight in base(folder, tiny).items():
        if name.endswith(products):
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": value for suffix, value in pack(name, weight, written).items()}
        else:
            tensors[name] = weight.astype(np.float16)
            written.numbers[name] = tensors[name].astype(np.float32)
    return finish(written, tensors, settings)


def note(written: Written, name: str, q: Numbers, scales: Numbers, zeros: Numbers | None, index: Numbers) -> None:
    """Remember signed integers and the numbers they stand for, in float64 until the end."""
    written.integers[name] = q.astype(np.int8)
    shifted = q.astype(np.float64) - (0 if zeros is None else zeros.astype(np.float64)[:, index])
    written.numbers[name] = (shifted * scales.astype(np.float64)[:, index]).astype(np.float32)


def gptq(
    folder: Path, bits: int = 4, group: int = 32, symmetric: bool = True, version: int = 1, permuted: bool = False, head: bool = False
) -> Written:
    """Write GPTQ: packed along ``in``, transposed; the first version stores zero points less 1."""
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": permuted}
    settings["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"

    def pack(name: str, weight: Numbers, written: Written) -> dict[str, Any]:
        size, middle = weight.shape[1], 1 << (bits - 1)
        index = np.arange(size) // (group if group > 0 else size)
        if permuted:
            index = np.random.default_rng(5).permutation(index)
        q, scales, zeros = rounded(weight, bits, group, symmetric, index)
        note(written, name, q - middle, scales, zeros - middle, index)
        stored = (zeros - (1 if version == 1 else 0)) & ((1 << bits) - 1)
        return {"qweight": words_of(q, bits).T, "qzeros": words_of(stored.T, bits), "scales": scales.T, "g_idx": index.astype(np.int32)}

    return each(folder, settings, pack, (*PRODUCTS, HEAD) if head else PRODUCTS)


def awq(folder: Path, group: int = 32) -> Written:
    """Write AWQ, gemm version: word j of an input holds outputs 8j + 0 2 4 6 1 3 5 7, from its lowest nibble on."""
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }

    def words(numbers: Numbers) -> Numbers:
        made = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
        for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            made |= numbers[:, output::8].astype(np.uint32) << np.uint32(4 * nibble)
        return made.view(np.int32)

    def pack(name: str, weight: Numbers, written: Written) -> dict[str, Any]:
        index = np.arange(weight.shape[1]) // group
        q, scales, zeros = rounded(weight, 4, group, False, index)
        note(written, name, q - 8, scales, zeros - 8, index)
        return {"qweight": words(q.T), "qzeros": words(zeros.T), "scales": scales.T}

    return each(folder, settings, pack)


def compressed(folder: Path, kind: str = "pack-quantized", bits: int = 4, group: int = 32, symmetric: bool = True) -> Written:
    """Write compressed-tensors: ``pack-quantized`` in words, ``int-quantized`` a byte each; ``group`` 0: one scale a row."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}}
    settings = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed", "config_groups": groups,
                "ignore": ["lm_head"]}  # fmt: skip

    def pack(name: str, weight: Numbers, written: Written) -> dict[str, Any]:
        middle = 1 << (bits - 1)
        index = np.arange(weight.shape[1]) // (group or weight.shape[1])
        q, scales, zeros = rounded(weight, bits, group, symmetric, index)
        note(written, name, q - middle, scales, None if symmetric else zeros - middle, index)
        parts: dict[str, Any] = {"weight_scale": scales}
        if kind == "int-quantized":
            return parts | {"weight": (q - middle).astype(np.int8), "input_scale": np.ones(1, np.float32)}
        if not symmetric:
            parts["weight_zero_point"] = words_of(zeros.T, bits).T
        return parts | {"weight_packed": words_of(q, bits), "weight_shape": np.array(weight.shape)}

    return each(folder, settings, pack)


def float8(
    folder: Path,
    method: str = "fp8",
    block: tuple[int, int] = (48, 32),
    tiny: Tiny = LLAMA,
    products: tuple[str, ...] = PRODUCTS,
) -> Written:
    """Write e4m3 numbers with a scale a block; a block that does not divide the rows is cut off at their end."""
    if method == "fp8":
        settings: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    else:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        settings = {"quant_method": method, "format": "float-quantized", "config_groups": groups, "ignore": ["lm_head"]}

    def pack(name: str, weight: Numbers, written: Written) -> dict[str, Any]:
        rows, columns = block if method == "fp8" else (1, weight.shape[1])
        scales = np.zeros((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        numbers = np.zeros(weight.shape, np.float32)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scales[i, j] = np.abs(weight[place]).max() / 448
                stored[place] = torch.from_numpy(weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
                numbers[place] = stored[place].float().numpy() * scales[i, j]
        written.numbers[name] = numbers
        return {"weight": stored, "weight_scale_inv" if method == "fp8" else "weight_scale": scales}

    return each(folder, settings, pack, products, tiny)


def bitsandbytes_int8(folder: Path) -> Written:
    """Write LLM.int8: the largest value of a row becomes 127."""
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_skip_modules": None}

    def pack(name: str, weight: Numbers, written: Written) -> dict[str, Any]:
        largest = np.abs(weight).max(1).astype(np.float32)
        q = np.round(weight * (127 / largest[:, None])).astype(np.int8)
        note(written, name, q, (largest / 127)[:, None], None, np.zeros(weight.shape[1], np.int64))
        return {"weight": q, "SCB": largest, "weight_format": np.zeros((), np.uint8)}

    return each(folder, settings, pack)


def bitsandbytes_nf4(folder: Path, nested: bool = True, blocksize: int = 64) -> Written:
    """Write NF4: places in a table of 16, the first of two in the high half; ``nested``: the scales are places in a table of 256."""
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    table, outer_table = np.array(NF4, np.float32), np.linspace(-1, 1, 256, dtype=np.float32)

    def pack(name: str, weight: Numbers, written: Written) -> dict[str, Any]:
        blocks = weight.reshape(-1, blocksize)
        absmax = np.abs(blocks).max(1)
        parts: dict[str, Any] = {"weight.quant_map": table}
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float32", "shape": list(weight.shape)}
        if nested:
            offset = float(absmax.mean())
            padded = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
            outer = np.abs(padded).max(1)
            places = np.abs(padded[:, :, None] / outer[:, None, None] - outer_table).argmin(-1)
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
            parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": outer_table}
            parts["weight.absmax"] = places.reshape(-1)[: len(absmax)].astype(np.uint8)
            absmax = (outer_table[places] * outer[:, None]).reshape(-1)[: len(absmax)] + np.float32(offset)
        else:
            parts["weight.absmax"] = absmax
        places = np.abs((blocks / absmax[:, None])[:, :, None] - table).argmin(-1)
        written.numbers[name] = (table[places] * absmax[:, None]).reshape(weight.shape)
        flat = places.reshape(-1).astype(np.uint8)
        packed = ((flat[0::2] << 4) | flat[1::2])[:, None]
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return parts | {"weight": packed, "weight.quant_state.bitsandbytes__nf4": text}

    return each(folder, settings, pack)
