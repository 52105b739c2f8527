"""Semantic operators as ONNX Runtime's own fused ones, where its CPU has a kernel for them; what is missing here stays standard.

Source: the operator schemas and CPU kernels of onnxruntime 1.31.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset23 as op

from calque.targets._standard import STANDARD, Table, ints, placed

DOMAIN = "com.microsoft"


def contrib(name: str, inputs: Sequence[Any], outputs: int = 1, **attributes: Any) -> Any:
    """Return what one of ONNX Runtime's own operators gives; a list where it has several outputs."""
    return placed(name, inputs, outputs, DOMAIN, **attributes)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return the product with a weight that stays [out, in], read as it is: a transposed one would be copied when the session loads."""
    out = contrib("FusedMatMul", [x, weight], transB=1)
    return out if bias is None else op.Add(out, bias)


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """Return ``SimplifiedLayerNormalization``, which belongs to the default domain without being in the standard."""
    if weight is None:
        return STANDARD[torch.ops.calque.rms_norm.default](x, weight, epsilon)
    return placed("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=epsilon, stash_type=1)


def flat_rms_norm(x: Any, weight: Any, epsilon: float, heads: int) -> Any:
    """Return ``BranchwiseRMSNorm``, which takes a head for a branch and so needs none as an axis of its own."""
    return contrib("BranchwiseRMSNorm", [x, weight], num_branches=heads, epsilon=epsilon)


def add_rms_norm(x: Any, residual: Any, weight: Any, epsilon: float) -> Any:
    """Return the norm of the sum, and the sum, which is the operator's fourth output."""
    made = contrib("SkipSimplifiedLayerNormalization", [x, residual, weight], 4, epsilon=epsilon)
    return made[0], made[3]


def add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """Return the norm of the sum, and the sum, which is the operator's fourth output."""
    made = contrib("SkipLayerNormalization", [x, residual, weight, bias], 4, epsilon=epsilon)
    return made[0], made[3]


def quick_gelu(x: Any, alpha: float = 1.0) -> Any:
    """Return x · sigmoid(alpha · x), which is SiLU where alpha is 1."""
    return contrib("QuickGelu", [x], alpha=alpha)


def grouped_attention(
    q: Any, k: Any, v: Any, past_key: Any, past_value: Any, bias: Any, key_mask: Any, cos: Any, sin: Any, sinks: Any,
    heads: int, kv_heads: int, scale: float, softcap: float, window: int, interleaved: bool,
) -> Any:  # fmt: skip
    """Return ``GroupQueryAttention``: its output, and the keys and values that it keeps.

    With a bias every row is told to hold all slots, for what padding there is the bias hides.
    """
    int32 = ir.DataType.INT32
    if bias is None:
        held = op.ReduceSum(key_mask, ints(1), keepdims=0)
        total = op.Shape(key_mask, start=1, end=2)
    else:
        total = op.Shape(bias, start=3, end=4)
        held = op.Expand(total, op.Shape(bias, start=0, end=1))
    last = op.Cast(op.Sub(held, ints(1)), to=int32)
    return tuple(
        contrib(
            "GroupQueryAttention",
            [q, k, v, past_key, past_value, last, op.Cast(op.Squeeze(total), to=int32), cos, sin, None, bias, sinks],
            3,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scale,
            softcap=softcap,
            local_window_size=window or -1,
            do_rotary=int(cos is not None),
            rotary_interleaved=int(interleaved),
        )
    )


def packed_linear(x: Any, packed: Any, scale: Any, zero_point: Any, bias: Any, bits: int, group: int, size: int) -> Any:
    """Return ``MatMulNBits``, which by itself computes with what it is given; the target adds its level."""
    out = packed.shape[0]
    return contrib("MatMulNBits", [x, packed, scale, zero_point, None, bias], bits=bits, block_size=group, K=size, N=out)


def packed_embedding(ids: Any, packed: Any, scale: Any, zero_point: Any, bits: int, group: int, size: int) -> Any:
    """Return ``GatherBlockQuantized`` of the bytes that a product reads too, which lie in three axes: a group's scale is one of its row."""
    scale, zero_point = (None if part is None else op.Unsqueeze(part, ints(2)) for part in (scale, zero_point))
    rows = contrib("GatherBlockQuantized", [packed, ids, scale, zero_point], bits=bits, block_size=group, gather_axis=0, quantize_axis=2)
    return op.Reshape(rows, ints(0, 0, size))


def packed_experts(
    x: Any, routing: Any, up: Any, up_scale: Any, up_zero_point: Any, up_bias: Any, down: Any, down_scale: Any, down_zero_point: Any,
    down_bias: Any, bits: int, group: int, chosen: int, alpha: float, beta: float, limit: float,
) -> Any:  # fmt: skip
    """Return ``QMoE``; by the routing it chooses experts, and weighs them: where none is below 0, those above it are the chosen."""
    return contrib(
        "QMoE",
        [x, routing, up, up_scale, up_bias, down, down_scale, down_bias, None, None, None, up_zero_point, down_zero_point, None, routing],
        k=chosen,
        expert_weight_bits=bits,
        block_size=group,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=alpha,
        activation_beta=beta,
        swiglu_limit=limit or math.inf,
    )


def dynamic_linear(x: Any, q: Any, scale: Any, bias: Any) -> Any:
    """Return ``DynamicQuantizeMatMul``, which rounds what it is given to the range of each call and multiplies integers."""
    return contrib("DynamicQuantizeMatMul", [x, q, scale, None, bias])


CONTRIB: Table = {
    **STANDARD,
    torch.ops.calque.grouped_attention.default: grouped_attention,
    torch.ops.calque.rms_norm.default: rms_norm,
    torch.ops.calque.flat_rms_norm.default: flat_rms_norm,
    torch.ops.calque.add_rms_norm.default: add_rms_norm,
    torch.ops.calque.add_layer_norm.default: add_layer_norm,
    torch.ops.calque.quick_gelu.default: quick_gelu,
    torch.ops.calque.packed_linear.default: packed_linear,
    torch.ops.calque.packed_embedding.default: packed_embedding,
    torch.ops.calque.packed_experts.default: packed_experts,
    torch.ops.calque.dynamic_linear.default: dynamic_linear,
    torch.ops.aten.silu.default: quick_gelu,
    torch.ops.aten.linear.default: linear,
}
