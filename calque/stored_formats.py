"""The forms in which published checkpoints hold quantized weights, as tensors: from bytes to integers and scales, or to numbers.

Each function takes the stored tensors of one weight as they are read. Words are int32, filled from their lowest bit on.

Source: AutoGPTQ 0.7.1, nn_modules/qlinear/qlinear_cuda_old.py; AutoAWQ 0.2.9, utils/packing_utils.py; compressed-tensors 0.20,
compressors/pack_quantized and naive_quantized; bitsandbytes 0.50, functional.py; transformers 5.23, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calque.stored_integers import Grouped

# The place of each of eight outputs among the nibbles of AWQ's words.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# bitsandbytes multiplies int8 weights by this, the float32 next to 1 / 127.
ONE_127TH = 7.874015718698502e-3


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` unsigned numbers of ``bits`` bits in each row of words [rows, words]: uint8 [rows, count].

    Numbers follow each other without gaps, so that one of 3, 5, 6 or 7 bits may begin in one word and end in the next.
    """
    if 8 % bits == 0:
        octets = words.contiguous().view(torch.uint8)
        return torch.stack([(octets >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1).flatten(1)[:, :count]
    start = torch.arange(count) * bits
    octets = torch.nn.functional.pad(words.contiguous().view(torch.uint8), (0, 1)).to(torch.int16)
    both = octets[:, start // 8] | (octets[:, start // 8 + 1] << 8)  # int16 wraps; what the sign fills is cut off
    return ((both >> (start % 8).to(torch.int16)) & ((1 << bits) - 1)).to(torch.uint8)


def signed(unsigned: Tensor, bits: int) -> Tensor:
    """Return what was stored plus 2^(bits-1), as int8."""
    return (unsigned.contiguous() - (1 << (bits - 1))).view(torch.int8)  # bytes wrap around


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, index: Tensor, bits: int, stored_less: int) -> Grouped:
    """Return the integers of GPTQ: packed along ``in``, zero points along ``out``, those of the first version stored less 1."""
    unsigned = unpack_words(qweight.t(), bits, len(index))
    # In the word the sum may not fit; AutoGPTQ cuts it off at the bits of one, too.
    zeros = (unpack_words(qzeros, bits, scales.shape[1]) + stored_less) & ((1 << bits) - 1)
    return Grouped(signed(unsigned, bits), _scales(scales.t()), signed(zeros.t().contiguous(), bits), index)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, index: Tensor) -> Grouped:
    """Return the integers of AWQ's gemm version: both packed along ``out``, eight to a word in an order of their own."""
    q, zeros = (_in_order(unpack_words(words, 4, words.shape[1] * 8)) for words in (qweight, qzeros))
    return Grouped(signed(q.t().contiguous(), 4), _scales(scales.t()), signed(zeros.t().contiguous(), 4), index)


def _in_order(numbers: Tensor) -> Tensor:
    return numbers.reshape(numbers.shape[0], -1, 8)[:, :, AWQ_PLACES].reshape(numbers.shape)


def _scales(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).contiguous()


def packed_rows(packed: Tensor, scale: Tensor, zero_point: Tensor | None, index: Tensor, bits: int, rows: int) -> Grouped:
    """Return the integers of compressed-tensors' pack-quantized: packed along ``in``, zero points along ``out``."""
    q = signed(unpack_words(packed, bits, len(index)), bits)
    if zero_point is not None:
        zero_point = signed(unpack_words(zero_point.t(), bits, rows).t().contiguous(), bits)
    return Grouped(q, _each_row(scale, rows), zero_point, index)


def plain_integers(q: Tensor, scale: Tensor, zero_point: Tensor | None, index: Tensor) -> Grouped:
    """Return the integers that compressed-tensors stores one a byte."""
    zero = None if zero_point is None else _each_row(zero_point, q.shape[0]).to(torch.int8)
    return Grouped(q, _each_row(scale, q.shape[0]), zero, index)


def _each_row(scale: Tensor, rows: int) -> Tensor:
    """Return scales [rows, groups] float32 of those of a tensor [1], of its rows [out, 1], or of groups."""
    flat = scale.to(torch.float32)
    return flat.reshape(1, 1).repeat(rows, 1) if flat.numel() == 1 else flat.reshape(rows, -1)


def bitsandbytes_int8(q: Tensor, largest: Tensor) -> Grouped:
    """Return the integers of LLM.int8: the largest value of each row is 127."""
    scale = largest.to(torch.float32).reshape(-1, 1) * ONE_127TH
    return Grouped(q, scale, None, torch.zeros(q.shape[1], dtype=torch.int64))


def bitsandbytes_4bit(packed: Tensor, absmax: Tensor, table: Tensor, shape: tuple[int, int], blocksize: int) -> Tensor:
    """Return the weight float32: two places in a table of 16 values a byte, the first in the high half; blocks run over rows."""
    flat = packed.contiguous().view(torch.uint8).flatten()
    values = table.to(torch.float32)[torch.stack([flat >> 4, flat & 15], -1).flatten().int()]
    count = shape[0] * shape[1]
    return (values[:count] * absmax.repeat_interleave(blocksize)[:count]).reshape(shape)


def bitsandbytes_absmax(absmax: Tensor, table: Tensor, outer: Tensor, blocksize: int, offset: float) -> Tensor:
    """Return the largest values of blocks, themselves places in a table of 256 values, scaled in blocks, around a mean."""
    return table.to(torch.float32)[absmax.int()] * outer.repeat_interleave(blocksize)[: len(absmax)] + offset


def float8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the weight float32 of e4m3 numbers, one scale a block of rows and columns; uint8 scales are powers of two, plus 127."""
    scale = (scale.to(torch.float32) - 127).exp2() if scale.dtype == torch.uint8 else scale.to(torch.float32)
    rows, columns = weight.shape
    by_row = scale.reshape(-(-rows // block[0]), -1).repeat_interleave(block[0], 0)[:rows]
    return weight.to(torch.float32) * by_row.repeat_interleave(block[1], 1)[:, :columns]
