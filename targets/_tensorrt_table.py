"""Semantic operators as TensorRT takes them: the standard's, but for what its parser refuses or its builder has no kernel for.

::

    attention           Attention without ``softmax_precision``, which the parser refuses, where there is a fused kernel
                        products and a softmax of float32 where there is none: float32, capped scores, sinks, uncommon heads
    prefix_attention    trt::TRT_Attention(q · scale, k, v, , , lengths), causal_kind lower_right

Source: TRT_custom_ops.md of onnx-tensorrt 11.1, and what the builder of TensorRT-RTX 1.7.1 takes.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset23 as op

from calque import slot_ops  # noqa: F401  # registers prefix_attention
from calque.targets._standard import STANDARD, Table, ints, lower_right, placed, wide, written_attention
from calque.targets._tensorrt_attention import fused

DOMAIN, PREFIX_ATTENTION = "trt", "TRT_Attention"
CAUSAL_KIND = "lower_right"


def attention(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, sinks: Any, causal: bool) -> Any:
    """Return ``Attention`` where the builder has a kernel for it, else attention written out."""
    if mask is None and causal:
        mask = lower_right(q, k)
    if softcap > 0 or sinks is not None or not fused(q.shape[3], v.shape[3], q.dtype, mask is not None):
        return written_attention(q, k, v, mask, scale, softcap, sinks)
    return op.Attention(q, k, v, mask, scale=scale)[0]


def prefix_attention(q: Any, k: Any, v: Any, lengths: Any, scale: float) -> Any:
    """Return ``TRT_Attention``, whose queries are multiplied by the scale beforehand: in float32, so that they are rounded once."""
    if not fused(q.shape[3], v.shape[3], q.dtype):
        return written_attention(q, k, v, prefix_mask(q, k, lengths), scale, 0.0, None)
    scaled = op.CastLike(op.Mul(wide(q), op.Constant(value_float=scale)), q)
    made = placed(PREFIX_ATTENTION, [scaled, k, v, None, None, lengths], domain=DOMAIN, causal_kind=CAUSAL_KIND)
    made.dtype = q.dtype
    return made


def prefix_mask(q: Any, k: Any, lengths: Any) -> Any:
    """Return which slots each query sees, bool [B, 1, S, M]: query ``i`` the slots ``j <= i + lengths - S``."""
    zero: Any = op.Constant(value_int=0)
    one: Any = op.Constant(value_int=1)
    new: Any = op.Shape(q, start=2, end=3)
    slot: Any = op.Range(zero, op.Squeeze(op.Shape(k, start=2, end=3)), one)
    query: Any = op.Unsqueeze(op.Range(zero, op.Squeeze(new), one), ints(0, 1, 3))
    before: Any = op.Unsqueeze(op.Sub(op.Cast(lengths, to=ir.DataType.INT64), new), ints(1, 2, 3))
    return op.LessOrEqual(slot, op.Add(query, before))


TENSORRT: Table = {
    **STANDARD,
    torch.ops.calque.attention.default: attention,
    torch.ops.calque.prefix_attention.default: prefix_attention,
}
