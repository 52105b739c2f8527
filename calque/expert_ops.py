"""A whole mixture of experts as one operator, its weights packed integers: a semantic operator beside those of ``ops.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from calque.packing import unpacked_weight


@torch.library.custom_op("calque::packed_experts", mutates_args=())
def packed_experts(
    x: Tensor,
    routing: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero_point: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero_point: Tensor | None,
    down_bias: Tensor | None,
    bits: int,
    group: int,
    chosen: int,
    alpha: float,
    beta: float,
    limit: float,
) -> Tensor:
    """Return the sum over experts of routing · down(g · sigmoid(alpha · g) · (v + beta)), [T, H]; g and v are up's even and odd rows.

    x [T, H]; routing float [T, E], zero or more, at most ``chosen`` of a token above 0. up uint8 [E, 2·I, H · bits / 8] and down
    [E, H, I · bits / 8] are packed as ``pack`` does, an expert beside the other; scales float32 [E, rows, groups], zero points
    uint8 [E, rows, bytes], biases [E, rows]. ``limit`` above 0 bounds g from above and v on both sides.
    """
    mixed = torch.zeros_like(x)
    for expert in range(up.shape[0]):

        def project(value: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, e: int = expert) -> Tensor:
            weight = unpacked_weight(packed[e], scale[e], None if zero is None else zero[e], bits, group)
            return torch.nn.functional.linear(value, weight, None if bias is None else bias[e])

        inner = project(x, up, up_scale, up_zero_point, up_bias)
        gate, value = inner[:, 0::2], inner[:, 1::2]
        if limit > 0:
            gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
        out = project(gate * torch.sigmoid(alpha * gate) * (value + beta), down, down_scale, down_zero_point, down_bias)
        mixed = mixed + out * routing[:, expert : expert + 1]
    return mixed


@packed_experts.register_fake
def _(
    x: Tensor, routing: Tensor, up: Tensor, up_scale: Tensor, up_zero_point: Tensor | None, up_bias: Tensor | None, down: Tensor,
    down_scale: Tensor, down_zero_point: Tensor | None, down_bias: Tensor | None, bits: int, group: int, chosen: int, alpha: float,
    beta: float, limit: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)
