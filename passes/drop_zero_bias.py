"""Drops a bias that adds nothing: configs ask for biases that some checkpoints hold as zeros.

::

    before  linear(%x, %w, %b)              %b all zeros, as the checkpoint has it
    after   linear(%x, %w)
    left    a bias with any other value; what is computed from it

Biases are vectors: reading them takes no memory to speak of. Source: the builder of onnxruntime-genai 0.18 leaves the same out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from calque.passes import Rewrites
from calque.patterns import aten, calls

if TYPE_CHECKING:
    from calque.traced import TracedModel


@dataclass(frozen=True)
class DropZeroBias:
    """No linear layer adds a bias of zeros."""

    after: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per bias."""
        count = 0
        for name, bias in model.parameters().items():
            users = [user for user in bias.users if calls(user, aten.linear.default) and user.args[2:] == (bias,)]
            if not users or model.weights[name].read().any():
                continue
            for user in users:
                user.args = user.args[:2]
            count += 1
        model.drop_unused_parameters()
        return Rewrites(count)
