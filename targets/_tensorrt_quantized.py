"""What TensorRT makes of quantized values that it should not: integers it reads as others, and what it has no form for.

Source: the reference of IQuantizeLayer and IDequantizeLayer in TensorRT 11; what the parser and the builder of TensorRT-RTX 1.7.1
were seen to do, which the tests hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from calque.targets._tensorrt_attention import Fault
from calque.targets._tensorrt_typed import constant, dims, given, number, settled

TAKEN = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1})
FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1})
CODES = TAKEN | FOUR_BITS | {ir.DataType.UINT8, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2FNUZ,
                             ir.DataType.INT2, ir.DataType.UINT2}  # fmt: skip
SYMMETRIC = "quantize symmetrically: int8, int4 or float8e4m3fn without zero points"
READERS = frozenset({"DequantizeLinear", "QuantizeLinear"})


def linear(node: ir.Node) -> Iterator[Fault]:
    """Yield what is wrong with ``QuantizeLinear`` and ``DequantizeLinear``."""
    codes = _codes(node)
    if codes is not None and codes not in TAKEN:
        # A zero point of UINT8 is taken for one of INT8, with a warning alone: 0 to 255 becomes -128 to 127.
        yield "quantized-type", f"codes of {codes.name} are refused, or read as INT8", SYMMETRIC
    zero = given(node, 2)
    if zero is not None:
        held = constant(zero)
        if held is None or held.astype("float32").any():
            yield "quantized-zero-point", "a zero point that is not 0 is refused", SYMMETRIC
    scale = given(node, 1)
    if not settled(scale):
        yield "quantized-scale", "a scale must be a constant", "quantize activations with ranges that were measured: int8-static"
    yield from _granularity(node, scale)
    if codes in FOUR_BITS and (sizes := dims(given(node, 0))) and all(isinstance(size, int) for size in sizes):
        count = math.prod(size for size in sizes if isinstance(size, int))
        if count % 2:
            yield "quantized-odd", f"{count} codes of 4 bits do not fill bytes", "leave this weight out of quantization"


def _codes(node: ir.Node) -> ir.DataType | None:
    """Return the type of the codes that a node makes or reads."""
    if node.op_type == "DequantizeLinear":
        read = given(node, 0)
        return None if read is None else read.dtype
    zero = given(node, 2)
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    told = number(node, "output_dtype")
    # The standard says UINT8 where nothing is told, TensorRT takes INT8.
    return ir.DataType(told) if told else ir.DataType.UINT8


def _granularity(node: ir.Node, scale: ir.Value | None) -> Iterator[Fault]:
    read = given(node, 0)
    sizes, scales = dims(read), dims(scale)
    if not scales or all(size == 1 for size in scales):
        return
    block, axis = number(node, "block_size"), number(node, "axis", 1)
    if block and sizes and axis % len(sizes) < len(sizes) - 2:
        yield "quantized-blocks", f"blocks along axis {axis} of {len(sizes)} are refused", "lay blocks along one of the last two axes"
    if block and sizes and len(scales) == len(sizes):
        others = [place for place in range(len(sizes)) if place != axis % len(sizes) and scales[place] != sizes[place]]
        if others:
            yield "quantized-blocks", "blocks along two axes are refused", "lay blocks along one of the last two axes"
    if not settled(read) and not _quantized_weight(read):
        why = "activations have one scale in all, only weights have one a channel"
        yield "quantized-channels", why, "quantize activations as int8-static"


def _quantized_weight(value: ir.Value | None) -> bool:
    """Return whether codes were made in the graph, of what is constant."""
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "QuantizeLinear" and settled(given(producer, 0))


def constants(value: ir.Value) -> Iterator[tuple[ir.Node, Fault]]:
    """Yield the nodes that read codes of an initializer as anything but codes."""
    if value.dtype not in CODES or value.dtype is None:
        return
    for use in value.uses():
        if use.node.op_type not in READERS:
            why = f"{use.node.op_type} reads codes of {value.dtype.name}, which only DequantizeLinear may"
            yield use.node, ("quantized-constant", why, "dequantize them first, or leave this weight out of quantization")
