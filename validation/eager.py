"""The untouched eager model's own answer to one row of tokens, or one image, alone: no padding, no cache, one thread."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import PIXELS
from calque.errors import SourceUnreadable
from calque.memory import ran_out
from calque.threads import one_thread
from calque.validation.drive import segments
from calque.validation.images import images
from calque.weights import read_into

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from calque.artifact import TensorSpec
    from calque.choices import NarrowType
    from calque.weights import Weight


def narrowed(model: torch.nn.Module, narrow: NarrowType | None) -> torch.nn.Module:
    """Return the model, in float32 as it was, with the weights of an artifact that stores those that are numbers in ``narrow``.

    Computing stays float32: what is then measured against it is the artifact's arithmetic, not the rounding of weights.
    """
    import torch

    if narrow is not None:
        dtype = getattr(torch, narrow)
        with torch.no_grad():
            for parameter in model.parameters():  # tied ones once; buffers are no weights
                parameter.copy_(parameter.to(dtype))
    return model


def with_weights(model: torch.nn.Module, replaced: Mapping[str, Weight]) -> torch.nn.Module:
    """Return the model with other values in those of its parameters that are named."""
    import torch

    with torch.no_grad():
        for name, weight in replaced.items():
            read_into(model.get_parameter(name), weight)
    return model


def eager_outputs(model: torch.nn.Module, tokens: Sequence[int], inputs: Sequence[TensorSpec]) -> dict[str, NDArray[np.float32]]:
    """Return every floating output of the model by name: [positions, size], or [size] where it speaks of the whole row.

    ``inputs``: those of the artifact; segments are given where it takes them, and the image of that number where it takes pixels.

    Raises:
        SourceUnreadable: the model's own code fails on the row.
    """
    import torch

    specs = {spec.name: spec for spec in inputs}
    given: dict[str, Any] = {}
    if PIXELS in specs:
        given[PIXELS] = torch.from_numpy(images(tokens, specs[PIXELS]))
    else:
        given["input_ids"] = torch.tensor([list(tokens)])
    if "token_type_ids" in specs:
        given["token_type_ids"] = torch.from_numpy(segments(np.ones((1, len(tokens)), np.int64), np.arange(len(tokens))[None]))
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        given["use_cache"] = False
    with torch.inference_mode(), one_thread():
        answered: Mapping[str, Any] = _answer(model, given, asked(tokens, inputs))
        found = {name: value for name, value in answered.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
        return {name: value[0].float().numpy() for name, value in found.items()}


def asked(tokens: Sequence[int], inputs: Sequence[TensorSpec]) -> str:
    """Return what the model was given, in words."""
    return f"image {tokens[0]}" if any(spec.name == PIXELS for spec in inputs) else f"a row of {len(tokens)} tokens"


def _answer(model: torch.nn.Module, given: Mapping[str, Any], what: str) -> Any:
    try:
        return model(**given)
    except Exception as error:  # foreign code, whose constructor took the config as it is, fails with whatever it meets first
        if ran_out(error):
            raise
        said = str(error).strip().partition("\n")[0]
        raise SourceUnreadable(
            f"the eager model itself fails on {what}: {type(error).__name__}: {said}",
            fix="check the values in config.json against the model's documentation",
        ) from error


def eager_draft(model: torch.nn.Module, rows: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Return rows of one length with the ``count`` tokens that the model's own cache makes likeliest; as they are where it has none.

    Rows are a batch and threads as many as there are: what comes out is a guess, to be checked by `eager_outputs`.
    """
    import torch

    tokens, cache = torch.tensor(rows), None
    try:
        with torch.inference_mode():
            for _ in range(count):
                given = tokens if cache is None else tokens[:, -1:]
                said = model(input_ids=given, past_key_values=cache, use_cache=True)
                tokens = torch.cat([tokens, said.logits[:, -1:].argmax(-1)], dim=1)
                if (cache := said.past_key_values) is None:
                    break
    except Exception as error:  # foreign code that knows no such cache; a guess that is not there costs time alone
        if ran_out(error):
            raise
    return [tuple(row) for row in tokens.tolist()]


def eager_states(model: torch.nn.Module, tokens: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Return the keys and values of the row alone, by output name (``present.{i}.key``), each [1, heads, tokens, size].

    The cache is a plain ``DynamicCache``, so that sliding layers keep every position.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True)
    states = {}
    for layer, (key, value, *_) in enumerate(cache):
        for kind, tensor in (("key", key), ("value", value)):
            if tensor is not None:
                states[f"present.{layer}.{kind}"] = tensor.float().numpy()
    return states
