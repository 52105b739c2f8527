"""AWQ: multiplies the input channels of a weight that matter by more before it is rounded, which the value before takes back.

    x · Wᵀ = (x / s) · (W · s)ᵀ        s [in], from mean |x| to a power that is searched

Source: AWQ, arXiv 2306.00978, section 3.2; the grid of 20 powers as in its reference implementation. The error of a product is
taken over all that was read, by its second moments: mean |x · dᵀ|² = d · E[xᵀx] · dᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calque.calibration import Moments
from calque.quantization import Scheme, dequantize, quantize

POWERS = tuple(step / 20 for step in range(20))
# What a channel is taken to read at least. Source: mit-han-lab/llm-awq, auto_scale.py.
LEAST = 1e-4

Part = tuple[Tensor, Scheme]


def channel_scales(parts: Sequence[Part], moments: Moments, shared: Callable[[Tensor], Tensor] = lambda scales: scales) -> Tensor:
    """Return the scales [in] with which weights [out, in] that read the same value lose least when they are rounded.

    ``shared`` gives channels that have to have one scale together the same.
    """
    best, chosen = float("inf"), torch.ones_like(moments.absolute)
    for power in POWERS:
        scales = shared(moments.absolute).clamp(min=LEAST).pow(power)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = sum(product_error(weight, scheme, moments, scales) for weight, scheme in parts)
        if error < best:
            best, chosen = float(error), scales
    return chosen


def product_error(weight: Tensor, scheme: Scheme, moments: Moments, scales: Tensor) -> float:
    """Return by how much, squared and summed over outputs, a product is off on average when its scaled weight is rounded."""
    made = quantize(weight * scales, replace(scheme, search=False))
    lost = dequantize(made.q, made.scale, made.zero_point, scheme.group) / scales - weight
    return float(((lost @ moments.second) * lost).sum())
