"""The optimization profiles of an engine: how small, typical and large each input of an artifact may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from calque.artifact import Artifact, TensorSpec

SCHEMA = 1
BOUNDS = ("min", "opt", "max")

Sizes = dict[str, tuple[int, int, int]]


def profiles(artifact: Artifact, count: Literal["one", "two"]) -> dict[str, Any]:
    """Return what profiles.json holds: a profile for every call, or one for prompts and one for single steps.

    Sizes are those of the recipe's ``dims``, but for the smallest, which is 1: any engine takes a row alone, and a step of one token, as
    decoding is and the proof asks for. No call is longer than ``limits.max_length``, which is how many slots there are: TensorRT
    drops what is written past them without a word.
    """
    sizes = _sizes(artifact)
    named = {"default": sizes}
    if count == "two" and artifact.states:
        named = {"prefill": sizes, "decode": {**sizes, "sequence_length": (1, 1, 1)}}
    inputs = artifact.graphs["model"].inputs
    return {
        "schema": SCHEMA,
        "profiles": [{"name": name, "shapes": _shapes(inputs, each)} for name, each in named.items()],
    }


def _sizes(artifact: Artifact) -> Sizes:
    dims: Mapping[str, Any] = artifact.recipe["dims"]
    batch, sequence = (1, *dims["batch_size"][1:]), (1, *dims["sequence_length"][1:])
    longest = artifact.limits.max_length
    if longest is not None:
        sequence = tuple(min(size, longest) for size in sequence)
    return {"batch_size": batch, "sequence_length": sequence}


def _shapes(inputs: tuple[TensorSpec, ...], sizes: Sizes) -> dict[str, dict[str, list[int]]]:
    """Return the shapes of the inputs that have more than one."""
    dynamic = [spec for spec in inputs if any(isinstance(size, str) for size in spec.shape)]
    return {
        spec.name: {bound: [size if isinstance(size, int) else sizes[size][at] for size in spec.shape] for at, bound in enumerate(BOUNDS)}
        for spec in dynamic
    }
