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


TOLERANCES = {
    row.dtype: row
    for row in (
        Tolerance(
            "float32",
            noise_per_layer=7e-6,
            factor=2.0,
            reason="eager float32 against float64, sums permuted, cached steps, sums of integers scaled: at most 2.3e-5 on 2–3 layers, "
            "3.5e-5 on 8, 1.4e-4 on 24, 2.9e-4 on 48 (sharp random models, 64 tokens; docs/tolerance.md); doubled for other lengths, "
            "vocabularies and kernels: 8.7e-5 on 8 layers and 1024 tokens",
        ),
        Tolerance(
            "float16",
            noise_per_layer=1.4e-2,
            factor=2.0,
            reason="eager float16 against eager float32 with the same weights, sums permuted, cached steps: at most 3.3e-2 on 2–3 layers, "
            "6.4e-2 on 8, 3.4e-1 on 24, 6.6e-1 on 48, 9.6e-2 on 8 and 1024 tokens (the same models; docs/tolerance.md); doubled as above",
        ),
        Tolerance(
            "bfloat16",
            noise_per_layer=9e-2,
            factor=2.0,
            reason="eager bfloat16 against eager float32 in the same way: at most 2.2e-1 on 2–3 layers, 6.8e-1 on 8, 1.8 on 24, 2.6 on 48, "
            "7.1e-1 on 8 and 1024 tokens",
        ),
        Tolerance(
            "int8 with experts",
            noise_per_layer=1.2,
            factor=2.0,
            reason="activations of 8 bits: where two experts score alike a token goes to the other, at one position in 200; "
            "at most 3.6 on 2 layers (mixtral, qwen3_moe, gpt_oss, int4 and int8, 2400 positions each). Rows whose activations are exact "
            "hold the artifact to the limit of float32",
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
