"""Weights that a checkpoint holds as integers in groups, or in another form than numbers: what they stand for, and what can be kept.

::

    grouped     weight[o, i] = (q[o, i] - zero_point[o, index[i]]) * scale[o, index[i]]
    kept        the same integers, where neighbours of 16 or more share a group: as quantize_weights puts them on the graph
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calque.integers_file import IntegersFile
from calque.quantization import LONGEST_GROUP, PIECE, SHORTEST_GROUP, Quantized, Scheme
from calque.quantized_weight import QuantizedWeight
from calque.weights import Derived, Stored, Weight

if TYPE_CHECKING:
    from torch import Tensor

# What becomes of a weight that a checkpoint holds in another form, as the report says it.
NUMBERS = "dequantized, the artifact holds numbers"
KEPT = "kept exactly, integers and scales are the checkpoint's own"


def anew(scheme: Scheme) -> str:
    """Return what the report says of weights that are quantized a second time."""
    return f"dequantized and quantized anew as {scheme}, which loses a second time"


@dataclass(frozen=True)
class Grouped:
    """Signed integers [out, in] int8, scales [out, groups] float32, zero points [out, groups] int8 or None, the group of each input."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    index: Tensor

    def numbers(self) -> Tensor:
        """Return the weight [out, in] float32, exactly what the integers stand for."""
        import torch

        weight = torch.empty(self.q.shape)
        step = max(1, PIECE // len(self.index))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            part = weight[rows].copy_(self.q[rows])
            if self.zero_point is not None:
                part -= self.zero_point[rows][:, self.index]
            part *= self.scale[rows][:, self.index]
        return weight

    def kept(self, group: int) -> Quantized:
        """Return the same integers in groups of ``group`` neighbours, 0 for whole rows; each group must lie within one of these."""
        first = self.index[:: group or len(self.index)]
        zero_point = None if self.zero_point is None else self.zero_point[:, first].contiguous()
        return Quantized(self.q, self.scale[:, first].contiguous(), zero_point)


@dataclass(frozen=True)
class Dequantized(Derived):
    """A float weight that the checkpoint holds in another form, ``form`` in words; reading it gives the numbers.

    ``scheme``: how its integers can be kept as they are, None where there are none or runtimes have no such groups. ``integers``
    gives them. ``stored``: the checkpoint's tensors that are read.
    """

    form: str = ""
    stored: tuple[Stored, ...] = ()
    scheme: Scheme | None = None
    integers: Callable[[], Quantized] | None = field(default=None, repr=False, compare=False)


@dataclass
class KeptWeight(QuantizedWeight):
    """A weight whose integers are those of the checkpoint; nothing is rounded."""

    @classmethod
    def of(cls, weight: Dequantized, file: IntegersFile) -> KeptWeight:
        """Return the weight's own integers as weights of a table."""
        assert weight.scheme is not None, f"{weight.form} cannot be kept"
        return cls(weight, weight.scheme, _no_rounding, file=file)

    def quantized(self) -> Quantized:
        """Return the checkpoint's integers."""
        assert isinstance(self.weight, Dequantized)
        assert self.weight.integers is not None
        return self.weight.integers()


def _no_rounding(_: Tensor) -> Quantized:
    raise AssertionError("integers that are kept are not made of numbers")


def held_group(index: Tensor | None, size: int, group: int) -> int | None:
    """Return the group in which integers can be kept, 0 for whole rows; None where no 16 neighbours share one.

    ``index``: the group of each input; None: each ``group`` neighbours have one.
    """
    ends = [group] if group < size else []
    if index is not None:
        ends = (index[1:] != index[:-1]).nonzero().flatten().add_(1).tolist()
    shared = math.gcd(size, *ends)
    found = min(shared & -shared, LONGEST_GROUP)
    if found < SHORTEST_GROUP:
        return None
    return found if ends else 0


def form_of(weight: Weight) -> str:
    """Return the forms in which a checkpoint holds what a weight is made of, in words; nothing where it holds numbers."""
    return ", ".join(dict.fromkeys(_forms(weight)))


def _forms(weight: Weight) -> Iterator[str]:
    if isinstance(weight, Dequantized):
        yield weight.form
    elif isinstance(weight, Derived):
        for source in weight.sources:
            yield from _forms(source)
