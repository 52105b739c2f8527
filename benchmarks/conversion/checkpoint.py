"""Writes a checkpoint of random weights: bfloat16 safetensors, config, and the tokenizer of ``builtin:quill``.

``python -m benchmarks.conversion.checkpoint SHAPE FOLDER``, from the repository root. A process of its own, so that the
benchmark itself never imports torch and stays small beside what it measures.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.conversion.shapes import SHAPES, Shape

TOKENIZER = Path(__file__).parents[2] / "calque" / "models" / "quill"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SEED = 0


def is_written(shape: Shape, folder: Path) -> bool:
    """Return whether the folder holds the whole checkpoint of this shape; config.json is written last."""
    config = folder / CONFIG
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")) == shape.config()


def write(shape: Shape, folder: Path) -> None:
    """The folder holds the checkpoint; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(shape.tensors(), shape.deviation, folder / WEIGHTS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(shape.config(), indent=1) + "\n", encoding="utf-8")


def _write_weights(tensors: Mapping[str, tuple[int, ...]], deviation: float, path: Path) -> None:
    """The file holds every tensor, drawn and written one after the other: the largest shape is larger than memory."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        start, end = end, end + math.prod(dims) * torch.bfloat16.itemsize
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(SEED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in tensors.items():
            values = torch.ones(dims) if name.endswith("norm.weight") else torch.randn(dims, generator=generator).mul_(deviation)
            file.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
