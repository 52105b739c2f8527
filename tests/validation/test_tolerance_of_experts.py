"""Mixtures whose activations are rounded have a limit of their own."""

from __future__ import annotations

from calque.validation.compare import EXPERTS, bounds
from calque.validation.drive import ModelIO
from calque.validation.reference import Reference
from calque.validation.tolerance import tolerance
from tests.quantized_models import Quantized


def test_mixture_whose_activations_are_rounded_has_limits_of_its_own_and_exact_rows_do_not() -> None:
    references = {"logits": Reference(None, (1.0,), {}, rounding=0.1)}
    mixture, dense = Quantized("mixtral").artifact, Quantized("llama").artifact
    limits = [bounds(ModelIO.of(artifact), references)[1] for artifact in (mixture, dense)]
    assert limits == [tolerance(EXPERTS).limit(2), 0.2]
    assert {bounds(ModelIO.of(artifact, exact=True), references)[1] for artifact in (mixture, dense)} == {tolerance("float32").limit(2)}
    # The largest difference that a tie between experts was seen to make.
    assert limits[0] > 3.6
