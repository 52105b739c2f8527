"""Between which numbers activations lie, measured on text, and what of it 8 bits should reach over. Tensors alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from calque.quantization import LARGEST_E4M3, Format, round_e4m3

Method = Literal["minmax", "percentile", "mse"]

# Bars of a histogram, on both sides of 0 together.
BARS = 8192
# The parts of a range that are tried, by how little error they leave.
PARTS = 64
SMALLEST_PART = 0.1


@dataclass
class ActivationRange:
    """What was seen of one product's input: the smallest and the largest value, and how often each between, as a histogram.

    The histogram reaches as far on both sides of 0, a power of two, and twice as far whenever a value is met that lies outside.
    """

    low: float = 0.0
    high: float = 0.0
    reach: float = 2.0**-20
    counts: Tensor = field(default_factory=lambda: torch.zeros(BARS, dtype=torch.float64), repr=False)

    def add(self, x: Tensor) -> None:
        """Count every value of ``x``."""
        if not x.numel():
            return
        low, high = (float(bound) for bound in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        while self.reach < max(-low, high):
            inner = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(inner, (BARS // 4, BARS // 4))
            self.reach *= 2
        # By a power of two: a value's bar is exact, and two bars become one without a remainder.
        bar = (x.flatten().float() * (BARS / 2 / self.reach)).floor_().to(torch.int32).add_(BARS // 2).clamp_(0, BARS - 1)
        self.counts += torch.bincount(bar, minlength=BARS)

    def bounds(
        self, method: Method, percentile: float = 100.0, symmetric: bool = False, format: Format = "integers"
    ) -> tuple[float, float]:
        """Return the smallest and the largest number that 8 bits of the format should reach over; 0 lies between.

        ``minmax``: all that was seen. ``percentile``: all but so many of the smallest and largest values. ``mse``: what leaves the
        smallest squared error, of what is clipped and what is rounded together. ``symmetric``: as far below 0 as above.
        """
        low, high = self.low, self.high
        if method == "percentile":
            low, high = self._percentile(percentile)
        if symmetric:
            high = max(-low, high)
            low = -high
        return self._least_error(low, high, symmetric, format) if method == "mse" else (low, high)

    def _percentile(self, percentile: float) -> tuple[float, float]:
        """Return the bounds outside of which (100 - percentile) % lie on either side."""
        below = self.counts.cumsum(0) / self.counts.sum().clamp(min=1)
        tail = 1 - percentile / 100
        edges = torch.linspace(-self.reach, self.reach, BARS + 1)
        low = float(edges[int((below <= tail).sum())])
        high = float(edges[min(BARS, int((below < 1 - tail).sum()) + 1)])
        return min(max(low, self.low), 0.0), max(min(high, self.high), 0.0)

    def _least_error(self, low: float, high: float, symmetric: bool, format: Format) -> tuple[float, float]:
        """Return the part of the range with the least error: of both sides together, then of each by itself, twice."""
        parts = torch.linspace(SMALLEST_PART, 1.0, PARTS)
        low, high = self._best([(low * part, high * part) for part in parts.tolist()], symmetric, format)
        for _ in range(0 if symmetric else 2):
            low, high = self._best([(max(self.low, low * (0.5 + part)), high) for part in parts.tolist()], symmetric, format)
            low, high = self._best([(low, min(self.high, high * (0.5 + part))) for part in parts.tolist()], symmetric, format)
        return low, high

    def _best(self, ranges: list[tuple[float, float]], symmetric: bool, format: Format) -> tuple[float, float]:
        """Return the one of the ranges whose 8 bits leave the least squared error over the histogram."""
        bars = self.counts.nonzero().flatten()
        width = 2 * self.reach / BARS
        values = (bars.to(torch.float64) + 0.5) * width - self.reach
        values = values.clamp(self.low, self.high)
        chosen = torch.tensor([steps(low, high, symmetric, format) for low, high in ranges], dtype=torch.float64)
        scale, zero, smallest, largest = chosen.unsqueeze(-1).unbind(1)
        counted = values.div(scale)
        if format == "e4m3":
            counted = round_e4m3(counted).to(torch.float64)
        else:
            counted.round_().add_(zero).clamp_(smallest, largest).sub_(zero)
        rounded = counted.mul_(scale)
        errors = rounded.sub_(values).square_() @ self.counts[bars]
        return ranges[int(errors.argmin())]


def steps(low: float, high: float, symmetric: bool, format: Format = "integers") -> tuple[float, int, int, int]:
    """Return scale, zero point, smallest and largest number in 8 bits that reach from ``low`` to ``high``.

    Symmetric: -128 to 127, zero point 0, as TensorRT wants it; else 0 to 255. e4m3, always symmetric: -448 to 448.
    """
    if format == "e4m3":
        largest = int(LARGEST_E4M3)
        return max(-low, high) / largest or 1.0, 0, -largest, largest
    if symmetric:
        return max(-low / 128, high / 127) or 1.0, 0, -128, 127
    scale = (high - low) / 255 or 1.0
    return scale, min(255, max(0, round(-low / scale))), 0, 255
