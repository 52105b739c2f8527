"""Image classification: ViT and its relatives, and convolutional networks; one call sees a batch of images, nothing is carried on.

::

    pixel_values       float32 [batch_size, channels, height, width]   the last three fixed
      -> image-classification    logits [batch_size, labels]

Names are those of optimum. Images have the size that the model's preprocessor makes them of, so that an artifact takes what the
preprocessor_config.json beside it gives, or else the one that the config says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers import PreTrainedConfig, PreTrainedModel

from calque.artifact import PIXELS, Limits, TensorSpec
from calque.checkpoint import read_json
from calque.companions import PREPROCESSOR
from calque.converters import causal_lm
from calque.converters.tidy import tidy
from calque.converters.weight_names import weight_table
from calque.errors import Unsupported
from calque.source import ModelSource
from calque.traced import TracedModel

# An example size while tracing: neither 0 nor 1, which export would bake in.
BATCH = 2
LOGITS = "logits"
# What a model's own code raises on images of a size that it cannot take.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)

Size = tuple[int, int]


def trace(source: ModelSource) -> TracedModel:
    """Return the model as one graph of semantic operators, with fake parameters and a table of where their bytes are.

    Raises:
        Unsupported: nobody says how large images are, the model takes more than them, or its code cannot be held by one graph.
        WeightMismatch: the ledger does not balance.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = causal_lm.build(source, mode)
    table = weight_table(model, source.weights, source.id)
    shape = (_channels(source.config), *_fitting_size(model, source, mode))
    program = _export(model, mode, shape)
    returned: Any = next(node for node in reversed(program.graph.nodes) if node.op == "output").args[0][0]
    traced = TracedModel(
        program=program,
        weights=table,
        states=(),
        inputs=(TensorSpec(PIXELS, "float32", ("batch_size", *shape)),),
        outputs=(TensorSpec(LOGITS, "float32", ("batch_size", int(returned.meta["val"].shape[-1]))),),
        limits=Limits(),
        settled=True,
    )
    tidy(traced)
    causal_lm.require(traced, table.entries)
    return traced


def _channels(config: PreTrainedConfig) -> int:
    """Return how many channels an image has: what the config, or the part of it for images, says; 3 where it does not."""
    return int(next((found for part in _parts(config) if (found := getattr(part, "num_channels", None))), 3))


def _parts(config: PreTrainedConfig) -> Iterator[Any]:
    yield config
    if (vision := getattr(config, "vision_config", None)) is not None:
        yield vision


def _fitting_size(model: PreTrainedModel, source: ModelSource, mode: FakeTensorMode) -> Size:
    """Return the height and width of images: the first of those that are known which the model runs on."""
    known = list(dict.fromkeys(image_sizes(source)))
    if not known:
        raise Unsupported(
            f"{source.id} ({source.config.model_type}) does not say how large its images are",
            [f"config.json  no image_size, {PREPROCESSOR}  no size of both sides"],
            f'write {{"size": {{"height": …, "width": …}}}} into {PREPROCESSOR} beside config.json',
        )
    said = []
    for size in known:
        with mode, torch.no_grad():
            try:
                _call(model, torch.zeros(BATCH, _channels(source.config), *size))
                return size
            except REFUSALS as error:
                said.append(f"{size[0]} x {size[1]}  {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    raise Unsupported(
        f"{source.config.model_type} does not run on images of {source.id} alone",
        said,
        "check image_size, or it needs inputs of another kind, or code that depends on the image",
    )


def image_sizes(source: ModelSource) -> Iterator[Size]:
    """Yield what is said of the height and width of images: by the preprocessor, which makes them, then by the config."""
    path = source.folder / PREPROCESSOR
    if path.is_file() and (made := preprocessed_size(read_json(path))):
        yield made
    for part in _parts(source.config):
        if size := _size(getattr(part, "image_size", None)):
            yield size


def preprocessed_size(table: Mapping[str, Any]) -> Size | None:
    """Return the height and width that a preprocessor leaves an image with; None where that depends on the image."""
    cut = _size(table.get("crop_size")) if table.get("do_center_crop") is not False else None
    return cut or _size(table.get("size"))


def _size(said: Any) -> Size | None:
    """Return height and width of ``224``, ``[224, 224]``, ``{height: 224, width: 224}`` and ``{shortest_edge: 224}``, then cut square."""
    if isinstance(said, Mapping):
        edge = said.get("shortest_edge")
        said = [said.get("height", edge), said.get("width", edge)]
    sides = list(said) if isinstance(said, list | tuple) else [said, said]
    whole = [side for side in sides if isinstance(side, int) and not isinstance(side, bool) and side > 0]
    return (whole[0], whole[1]) if len(whole) == len(sides) == 2 else None


def _call(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    logits: Tensor = type(model).forward(model, pixel_values=pixels, return_dict=True).logits
    return logits


def _export(model: PreTrainedModel, mode: FakeTensorMode, shape: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """Return the program, the batch dynamic."""

    def forward(self: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor]:
        return (_call(self, pixel_values),)

    # Exported as itself, not inside a wrapper, so that parameter names stay those of the checkpoint.
    model.forward = MethodType(forward, model)
    with mode:
        pixels = torch.zeros(BATCH, *shape)
    return causal_lm.exported(model, (pixels,), ({0: Dim("batch_size")},))
