"""One weight's integers, scales and zero points as weights of a table, made once however often they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from calque.integers_file import IntegersFile
from calque.packing import pack, unpack
from calque.quantization import Quantized, Scheme, dequantize, narrow_scale, quantize
from calque.weights import Derived, Weight

Part = Literal["q", "scale", "zero_point"]

# What `numbers_of` does, as a weight says it of itself.
NUMBERS = "numbers"


@dataclass
class QuantizedWeight:
    """The integers of ``weight``: ``make`` gives them; ``by_rows``: also those of some of its rows, the same.

    What was made is in ``file`` from then on: it is written to the artifact, judged and compared with, and costly to make.
    """

    weight: Weight
    scheme: Scheme
    make: Callable[[Tensor], Quantized]
    by_rows: bool = False
    file: IntegersFile = field(default_factory=IntegersFile, repr=False)
    _places: dict[Part, int] = field(default_factory=dict, init=False, repr=False)
    _made: bytearray = field(default_factory=bytearray, init=False, repr=False)

    @classmethod
    def nearest(cls, weight: Weight, scheme: Scheme, file: IntegersFile | None = None) -> QuantizedWeight:
        """Return the weight rounded to the nearest integers."""
        return cls(weight, scheme, partial(quantize, scheme=scheme), by_rows=True, file=file or IntegersFile())

    def quantized(self) -> Quantized:
        """Return the integers, made now."""
        return self.make(self.weight.read())

    def parts(self) -> dict[Part, Derived]:
        """Return the weights of the table: q, scale and, where they are asymmetric, zero_point."""
        rows, columns = self.weight.shape
        q = self._part("q", str(self.scheme.dtype).removeprefix("torch."), (rows, columns))
        made: dict[Part, Derived] = {"q": q, "scale": self._part("scale", "float32", self._groups)}
        return made if self.scheme.symmetric else {**made, "zero_point": self._part("zero_point", "int8", self._groups)}

    def dequantized(self, scales: torch.dtype = torch.float32) -> Numbers:
        """Return the float weight that the integers stand for, float32 whatever type their scales are of."""

        def rows(start: int, stop: int) -> Tensor:
            made = self._quantized(start, stop)
            scale = made.scale if scales == torch.float32 else narrow_scale(made.scale, scales).to(torch.float32)
            return dequantize(made.q, scale, made.zero_point, self.scheme.group)

        shape = tuple(self.weight.shape)
        whole, some = partial(rows, 0, shape[0]), rows if self._divides else None
        return Numbers((), f"dequantize({self.scheme})", whole, "float32", shape, moved=False, rows=some, made=self)

    @property
    def _groups(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns // (self.scheme.group or columns)

    @property
    def _divides(self) -> bool:
        """Whether some rows can be made without the others."""
        return self.by_rows and self.weight.by_rows

    @property
    def _row_bytes(self) -> dict[Part, int]:
        """What a row of each part takes in the file, integers of 4 bits two in one."""
        groups = self._groups[1]
        sizes: dict[Part, int] = {"q": self.weight.shape[1] * self.scheme.bits // 8, "scale": groups * torch.float32.itemsize}
        return sizes if self.scheme.symmetric else {**sizes, "zero_point": groups}

    def _part(self, name: Part, dtype: str, shape: tuple[int, int]) -> Derived:
        rows = partial(self._rows, name)
        whole = partial(rows, 0, shape[0])
        return Derived((), f"quantize({self.scheme}).{name}", whole, dtype, shape, moved=False, rows=rows if self._divides else None)

    def _rows(self, name: Part, start: int, stop: int) -> Tensor:
        if not self._known(start, stop):
            part: Tensor = getattr(self._quantized(start, stop), name)
            return part
        return self._read(name, start, stop)

    def _quantized(self, start: int, stop: int) -> Quantized:
        """Return the integers of some rows; all of them are made where some alone cannot be."""
        if self._known(start, stop):
            zero_point = None if self.scheme.symmetric else self._read("zero_point", start, stop)
            return Quantized(self._read("q", start, stop), self._read("scale", start, stop), zero_point)
        whole = stop - start == self.weight.shape[0]
        made = self.quantized() if whole else self.make(self.weight.read_rows(start, stop))
        self._keep(start, stop, made)
        return made

    def _known(self, start: int, stop: int) -> bool:
        return bool(self._made) and 0 not in self._made[start:stop]

    def _keep(self, start: int, stop: int, made: Quantized) -> None:
        rows, columns = self.weight.shape
        if not self._made:
            self._made = bytearray(rows)
            self._places = {name: self.file.reserve(rows * size) for name, size in self._row_bytes.items()}
        for name, size in self._row_bytes.items():
            part: Tensor = getattr(made, name)
            self.file.write(self._places[name] + start * size, pack(part, self.scheme.bits, columns) if name == "q" else part)
        self._made[start:stop] = bytes([1]) * (stop - start)

    def _read(self, name: Part, start: int, stop: int) -> Tensor:
        size = self._row_bytes[name]
        data = self.file.read(self._places[name] + start * size, (stop - start) * size).reshape(stop - start, size)
        if name == "q":
            return unpack(data, self.scheme.bits, self.weight.shape[1]).view(self.scheme.dtype)
        return data.view(torch.float32 if name == "scale" else torch.int8)


@dataclass(frozen=True)
class Numbers(Derived):
    """The float weight that the integers of ``made`` stand for."""

    made: QuantizedWeight | None = field(default=None, repr=False, compare=False)


def with_scales(weight: Weight, dtype: torch.dtype) -> Weight:
    """Return what integers stand for, however it is laid, where their scales are in a narrower type; another weight as it is."""
    if isinstance(weight, Numbers) and weight.made:
        return weight.made.dequantized(dtype)
    if not isinstance(weight, Derived) or not weight.sources:
        return weight
    return replace(weight, sources=tuple(with_scales(source, dtype) for source in weight.sources))


def numbers_of(q: Weight, scale: Weight, zero_point: Weight | None = None, *, group: int) -> Derived:
    """Return the float weight [out, in] that integers of a table stand for, computed of them when it is read, some rows at a time."""
    parts = (q, scale) if zero_point is None else (q, scale, zero_point)

    def made(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return dequantize(q, scale, zero_point, group)

    return Derived(parts, NUMBERS, made, "float32", tuple(q.shape), moved=False, acts="each row")
