"""The semantic operators of integers in panels, as vectors of a processor read them: eight outputs side by side.

::

    int8   q int8 [panels, in / 4, 8, 4]       output 8 · panel + n, input 4 · step + t
    int4   q uint8 [panels, in / 8, 8, 4]      the low half holds input 8 · step + t, the high one 8 · step + 4 + t, each plus 8
    scale  float32 [panels, groups, 8]         one group where all inputs of an output share a scale; zero_point int8 likewise

The last panel is filled with zeros. A lookup reads the rows that it is asked for out of the same panels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calque.quantization import round_blocks

# Outputs of a panel: as many as a vector of 256 bits has sums of 32.
LANES = 8
# Inputs that one instruction multiplies and adds.
QUAD = 4


def lay_in_panels(q: Tensor, bits: int) -> Tensor:
    """Return signed integers [out, in] in panels; ``in`` is a multiple of 8."""
    rows, columns = q.shape
    filled = torch.nn.functional.pad(q, (0, 0, 0, -rows % LANES))
    quads = filled.reshape(-1, LANES, columns // QUAD, QUAD).transpose(1, 2)
    if bits == 8:
        return quads.contiguous()
    halves = (quads + 8).view(torch.uint8)
    return (halves[:, 0::2] | (halves[:, 1::2] << 4)).contiguous()


def lay_scales(scale: Tensor) -> Tensor:
    """Return scales or zero points [out, groups] beside the panels that they belong to."""
    filled = torch.nn.functional.pad(scale, (0, 0, 0, -scale.shape[0] % LANES))
    return filled.reshape(-1, LANES, scale.shape[1]).transpose(1, 2).contiguous()


def out_of_panels(panels: Tensor) -> Tensor:
    """Return signed integers, int8 [out, in], of panels: what `lay_in_panels` was given, and the rows that fill the last panel."""
    quads = _quads(panels).transpose(1, 2)
    return quads.reshape(-1, quads.shape[2] * QUAD)


def out_of_scales(panels: Tensor) -> Tensor:
    """Return scales or zero points [out, groups]: what `lay_scales` was given, and zeros for the rows that fill the last panel."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])


def _quads(panels: Tensor) -> Tensor:
    """Return signed integers [..., steps of four inputs, outputs, 4]."""
    if panels.dtype == torch.int8:
        return panels
    halves = torch.stack([panels & 15, panels >> 4], 2).to(torch.int8) - 8
    return halves.flatten(1, 2)


def _dequantized(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return numbers [rows, in] of integers [rows, in], scales and zero points [rows, groups]."""
    grouped = q.to(torch.float32).reshape(q.shape[0], scale.shape[1], -1)
    if zero_point is not None:
        grouped = grouped - zero_point.to(torch.float32).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).reshape(q.shape)


def in_halves(q: Tensor) -> Tensor:
    """Return signed integers of 4 bits, [out, in], two in a byte: uint8 [out, in / 2], each plus 8, the first in the low half."""
    halves = (q + 8).view(torch.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


@torch.library.custom_op("calque::out_of_halves", mutates_args=())
def out_of_halves(packed: Tensor) -> Tensor:
    """Return the signed integers, int8 [out, in], that `in_halves` was given."""
    return torch.stack([packed & 15, packed >> 4], -1).to(torch.int8).flatten(1) - 8


@out_of_halves.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int8)


@torch.library.custom_op("calque::panel_linear", mutates_args=())
def panel_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    rounds: Tensor | None,
    bits: int,
    block: int,
    outputs: int,
) -> Tensor:
    """Return x · weightᵀ + bias, x float32 [..., in], of a weight whose integers lie in panels.

    ``rounds`` int8 [1]: where it is not 0, x is rounded to 8 bits first, each ``block`` of it with a scale of its own.
    """
    zeros = None if zero_point is None else out_of_scales(zero_point)
    weight = _dequantized(out_of_panels(q), out_of_scales(scale), zeros)[:outputs]
    given = round_blocks(x, block) if rounds is not None and bool(rounds) else x
    return torch.nn.functional.linear(given, weight, bias)


@panel_linear.register_fake
def _(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    rounds: Tensor | None,
    bits: int,
    block: int,
    outputs: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op("calque::panel_lookup", mutates_args=())
def panel_lookup(ids: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the rows, float32 [*ids, in], that ids ask for of a table whose integers lie in panels."""
    flat = ids.reshape(-1)
    panel, lane = flat // LANES, flat % LANES
    zeros = None if zero_point is None else zero_point[panel, :, lane]
    rows = q[panel, :, lane].unsqueeze(2)  # [rows, steps, 1, 4]
    numbers = _dequantized(_quads(rows).flatten(1), scale[panel, :, lane], zeros)
    return numbers.reshape(*ids.shape, -1)


@panel_lookup.register_fake
def _(ids: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    steps = q.shape[1] * (2 if q.dtype == torch.uint8 else 1)
    return scale.new_empty(*ids.shape, steps * QUAD)
