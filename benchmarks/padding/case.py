"""The case: a small llama whose faults show, ragged rows of tokens, and what eager answers to each row by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.conversion import checkpoint
from benchmarks.conversion.shapes import Shape

SHAPE = Shape("Llama, four small layers", 4, 64, 128, 4, 2, 4096, 256, 10000.0)
LENGTHS, STEPS = (9, 5, 8), 8
SIDES = ("left", "right")
SEED = 0


@dataclass(frozen=True)
class Call:
    """One call of a model: every array is ``[rows, columns] int64``, ``mask`` over the cache and the new columns."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    positions: NDArray[np.int64]


def rows() -> list[NDArray[np.int64]]:
    """Return the tokens of each row, its prompt and one more for every step: the same for all, whatever they answer."""
    chosen = np.random.default_rng(SEED)
    return [chosen.integers(3, SHAPE.vocabulary, length + STEPS) for length in LENGTHS]


def calls(side: str) -> Iterator[Call]:
    """Yield the prompts, padded on the side to the longest, and then a token of every row in each call.

    Masks and positions are those of transformers' ``generate``: new columns are appended after the padding, and a
    token's position counts the row's tokens before it.
    """
    width = max(LENGTHS)
    mask = np.zeros((len(LENGTHS), width + STEPS), np.int64)
    ids = np.zeros_like(mask)
    for row, (tokens, length) in enumerate(zip(rows(), LENGTHS, strict=True)):
        start = width - length if side == "left" else 0
        mask[row, start : start + length] = 1
        mask[row, width:] = 1
        ids[row, start : start + length], ids[row, width:] = tokens[:length], tokens[length:]
    positions = np.clip(mask.cumsum(axis=1) - 1, 0, None)
    yield Call(ids[:, :width], mask[:, :width], positions[:, :width])
    for end in range(width + 1, width + STEPS + 1):
        yield Call(ids[:, end - 1 : end], mask[:, :end], positions[:, end - 1 : end])


def own(side: str, answers: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Return the logits of each row's own tokens, ``[tokens, vocabulary]``, from those of all columns of all calls."""
    width = max(LENGTHS)
    found = []
    for row, length in enumerate(LENGTHS):
        start = width - length if side == "left" else 0
        found.append(np.concatenate([answers[0][row, start : start + length], *(answer[row] for answer in answers[1:])]))
    return found


def write(folder: Path) -> None:
    """The folder holds the checkpoint: float32 weights that make attention sharp, so that a wrong mask or position shows."""
    from transformers import AutoConfig

    from calque.random_weights import write_random_weights

    if (folder / "written").is_file():
        return
    checkpoint.write(SHAPE, folder)
    config = json.loads((folder / checkpoint.CONFIG).read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
    (folder / checkpoint.CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_random_weights(AutoConfig.from_pretrained(folder), folder, SEED)
    (folder / "written").touch()


def eager(folder: Path) -> list[NDArray[np.float32]]:
    """Return what transformers answers to each row alone, without padding or cache: ``[tokens, vocabulary]``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.train(False)
    with torch.no_grad():
        return [model(torch.from_numpy(tokens)[None]).logits[0].numpy() for tokens in rows()]


@dataclass(frozen=True)
class Error:
    """The largest |Δ|/σ of one row over its prompt, and over its steps."""

    prompt: float
    steps: float

    @property
    def worst(self) -> float:
        """Return the larger of both."""
        return max(self.prompt, self.steps)


def errors(answers: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> list[Error]:
    """Return the error of each row; σ is the standard deviation of what eager answers to it.

    A logit that is not a number is as wrong as a number can be.
    """
    found = []
    for answer, right, length in zip(answers, expected, LENGTHS, strict=True):
        delta = np.nan_to_num(np.abs(answer - right).max(axis=1) / right.std(), nan=np.finfo(np.float32).max)
        found.append(Error(float(delta[:length].max()), float(delta[length:].max())))
    return found
