"""What TorchScript targets have done to the graph, and how they lower it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from calque.choices import NarrowType
from calque.passes import Pass
from calque.targets import _torchscript
from calque.targets._aten import dot_product_attention, to_aten
from calque.targets._torchscript_integers import own
from calque.traced import TracedModel


def listed(integers: Mapping[str, Any] | None, narrow: NarrowType | None, activations: Literal["dynamic", "float32"]) -> tuple[Pass, ...]:
    """Return the passes of a target that speaks TorchScript, in order; ``integers``: the options of what makes them."""
    from calque.passes.cache_dynamic import CacheDynamic
    from calque.passes.cast_precision import CastPrecision
    from calque.passes.drop_zero_bias import DropZeroBias
    from calque.passes.fuse_gelu import FuseGelu
    from calque.passes.fuse_layer_norm import FuseLayerNorm
    from calque.passes.lay_out_integers import LayOutIntegers
    from calque.passes.quantize_activations import QuantizeActivations
    from calque.passes.quantize_weights import QuantizeWeights
    from calque.passes.simplify_shapes import SimplifyShapes

    rounded = integers is not None and activations == "dynamic"
    return (
        *((QuantizeActivations("dynamic"),) if rounded else ()),  # ranges of the model as it was trained
        *((QuantizeWeights(**integers),) if integers else ()),  # first, while parameters have the names of the checkpoint
        DropZeroBias(),  # an addition less for each
        FuseGelu(),  # up to eight operators an activation become one
        FuseLayerNorm(),  # so do those of a layer norm that is written out
        CacheDynamic(),  # past in, present out
        SimplifyShapes(),  # what is left of shapes
        *((LayOutIntegers(),) if rounded else ()),  # products of integers
        *((CastPrecision(narrow),) if narrow else ()),  # last: casts would stand between what the others look for
    )


def lower(model: TracedModel) -> _torchscript.Writer:
    """Return the model's lines of TorchScript."""
    meanings = {torch.ops.calque.attention.default: dot_product_attention}
    written = own(model)
    return _torchscript.write(to_aten(model, meanings, whole=written), model, written)
