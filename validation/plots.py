"""The geometry of the report's plots, in per cent, so that they fill whatever width they are given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# More tick labels than these would run into each other on a phone.
MOST_TICKS = 6
LAYER_TICKS = 8
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class LogScale:
    """Decades ``low`` to ``high`` of 10 laid out over 0 to 100 per cent."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[float]) -> LogScale:
        """Return whole decades that hold every value above 0; 10⁻⁷ to 10⁻⁴ where there is none."""
        exponents = [math.log10(value) for value in values if 0 < value < math.inf] or [-7, -4]
        low, high = math.floor(min(exponents)), math.ceil(max(exponents))
        return cls(low if low < high else low - 1, high)

    def at(self, value: float | None) -> float:
        """Return where the value lies, 0 for what is too small and 100 for what is too large, or no number."""
        if value is None or math.isinf(value):
            return 100.0
        if value <= 0:
            return 0.0
        return round(min(100.0, max(0.0, 100 * (math.log10(value) - self.low) / (self.high - self.low))), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Where to write which power of ten; at most six of them."""
        step = math.ceil((self.high - self.low) / (MOST_TICKS - 1))
        return [(self.at(10.0**power), f"10{str(power).translate(SUPERSCRIPTS)}") for power in range(self.low, self.high + 1, step)]


def scientific(value: float | None) -> str:
    """Return the figure as people write it: 5.9 × 10⁻⁶."""
    if value is None:
        return "–"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}" if value else "0"


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{scientific(value)} σ"


def share(value: float, most: float) -> float:
    """Return the value in per cent of the largest."""
    return round(100 * value / most, 2) if most else 0.0


def layer_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the plot of layers is drawn from: its scale, the limit, and for each kind of state its points and lines."""
    limit = max(row["limit"] for row in rows)
    scale = LogScale.of([limit, *(row["worst_sigma"] or 0 for row in rows)])
    layers = sorted({row["layer"] for row in rows})
    # Half a step of room at both ends, so that no point is cut.
    places = {layer: round(100 * (place + 0.5) / len(layers), 2) for place, layer in enumerate(layers)}
    kinds = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        points = [
            {
                "x": places[row["layer"]],
                "y": round(100 - scale.at(row["worst_sigma"]), 2),
                "bad": row["worst_sigma"] is None or row["worst_sigma"] > row["limit"],
                "text": f"layer {row['layer']} {kind}: {_figure(row['worst_sigma'])}",
            }
            for row in rows
            if row["kind"] == kind
        ]
        kinds[kind] = {"points": points, "lines": list(pairwise(points))}
    step = math.ceil(len(layers) / LAYER_TICKS)
    return {
        "kinds": kinds,
        "limit": limit,
        "limit_y": round(100 - scale.at(limit), 2),
        "y_ticks": [(round(100 - place, 2), label) for place, label in scale.ticks],
        "x_ticks": [(places[layer], layer) for layer in layers[::step]],
    }
