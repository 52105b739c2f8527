"""How far an honest artifact may lie from eager, in σ of the output: one row per dtype, each derived from a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from calque.errors import Unsupported


@dataclass(frozen=True)
class Tolerance:
    """One dtype's row. Noise and limit grow with the layers, as each adds its rounding and passes on what came before.

    ``noise_per_layer`` · (layers + 1) bounds every |Δ|/σ measured between two honest computations, the head counting as
    one more layer; ``factor`` times that is the limit.
    """

    dtype: str
    noise_per_layer: float
    factor: float
    reason: str

    def noise(self, layers: int) -> float:
        """Return the largest |Δ|/σ that rounding was seen to cause in a model of so many layers."""
        return self.noise_per_layer * (layers + 1)

    def limit(self, layers: int) -> float:
        """Return the |Δ|/σ above which an artifact has failed."""
        return self.factor * self.noise(layers)


# float16 and bfloat16 get a row when a target computes in them and their noise has been measured the same way.
TOLERANCES = {
    row.dtype: row
    for row in (
        Tolerance(
            "float32",
            noise_per_layer=5e-6,
            factor=2.0,
            reason="eager float32 against float64, sums permuted, cached steps: at most 1.3e-5 on 2–3 layers, 3.5e-5 on 8, 1.2e-4 on 24, "
            "2.2e-4 on 48 (sharp random models, 64 tokens; docs/tolerance.md); doubled for other lengths, vocabularies and kernels",
        ),
    )
}


def tolerance(dtype: str) -> Tolerance:
    """Return the row of that dtype.

    Raises:
        Unsupported: its noise has not been measured.
    """
    if dtype not in TOLERANCES:
        raise Unsupported(
            f"no tolerance has been measured for {dtype}", fix="measure its noise with benchmarks/measure_noise.py and add a row"
        )
    return TOLERANCES[dtype]
