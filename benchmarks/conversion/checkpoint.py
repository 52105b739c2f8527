"""Writes a checkpoint of random weights: bfloat16 safetensors, config, and the tokenizer of ``builtin:quill``.

``python -m benchmarks.conversion.checkpoint SHAPE FOLDER``, from the repository root. A process of its own, so that the
benchmark itself never imports torch and stays small beside what it measures.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

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
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)

    def draw(name: str, dims: tuple[int, ...]) -> torch.Tensor:
        values = torch.ones(dims) if name.endswith("norm.weight") else torch.randn(dims, generator=generator) * shape.deviation
        return values.to(torch.bfloat16)

    save_file({name: draw(name, dims) for name, dims in shape.tensors().items()}, folder / WEIGHTS, metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(shape.config(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(SHAPES[sys.argv[1]], Path(sys.argv[2]))
