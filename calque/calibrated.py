"""Calibrations of a whole model's weights: run once, when the first integers are read, a block at a time.

A plan of a conversion reads none, and what it rewrites looks the same. Both give the integers of a weight by its name; AWQ also says
what becomes of the parameters before a product, which take its scales back.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from calque.awq import channel_scales
from calque.awq_folding import Fold, Folder, divided
from calque.calibration import Block, Moments, Product, Stream, Values, together
from calque.gptq import gptq
from calque.packing import pack, unpack
from calque.quantization import Quantized, Scheme, dequantize, quantize

if TYPE_CHECKING:
    from calque.traced import TracedModel

Rows = Sequence[Sequence[int]]


class Calibration(Protocol):
    """Gives the integers of weights; ``divided`` are parameters of other products that change with them."""

    @property
    def divided(self) -> Sequence[str]:
        """The names of the vectors that become others."""
        ...

    @property
    def left(self) -> Sequence[tuple[str, str]]:
        """What could not be done to which weight, and why."""
        ...

    def quantized(self, name: str, weight: Tensor) -> Quantized:
        """Return the integers of the weight of that name, which is ``weight`` [out, in]."""
        ...

    def vector(self, name: str, value: Tensor) -> Tensor:
        """Return what becomes of a vector of `divided`, which is ``value``."""
        ...


class Awq:
    """Weights whose input channels are scaled before they are rounded to the nearest, and a narrower range weighed by what is read.

    Every product is measured on what the model reads before anything is rounded.
    """

    def __init__(self, model: TracedModel, rows: Rows, products: Sequence[Product], schemes: Mapping[str, Scheme]) -> None:
        self.model, self.rows, self.products, self.schemes = model, rows, products, schemes
        folder = Folder(model, {product.parameter: product.weight for product in products})
        self.folds = {group[0].read: folder.fold(group) for group in together(products)}

    @property
    def divided(self) -> Sequence[str]:
        """The names of norms' weights and of biases that take scales back."""
        return [name for fold in self.folds.values() if isinstance(fold, Fold) for name, _ in fold.vectors]

    @property
    def left(self) -> Sequence[tuple[str, str]]:
        """Which weights have no scales, and why."""
        folds = [(product.weight, self.folds[product.read]) for product in self.products]
        return [(name, f"rounded without scales: {fold}") for name, fold in folds if isinstance(fold, str)]

    def quantized(self, name: str, weight: Tensor) -> Quantized:
        """Return the nearest integers of the weight with its columns multiplied and its rows divided."""
        found = self._found
        made = weight.to(torch.float32) * found.columns[name]
        if name in found.rows:
            made = made / found.rows[name][:, None]
        return quantize(made, self.schemes[name], found.squares[name])

    def vector(self, name: str, value: Tensor) -> Tensor:
        """Return the norm's weight or the bias, divided by the scales."""
        return divided(value, *self._found.vectors[name])

    @cached_property
    def _found(self) -> _Found:
        found = _Found()
        stream = Stream(self.model, self.rows, self.products)
        for block in stream.blocks:
            moments = {product.read: Moments() for product in block.products}
            first = {group[0].weight: group[0].read for group in together(block.products)}
            weights = stream.read(block)
            stream.pass_through(block, weights, lambda name, x, at=first, to=moments: to[at[name]].add(x) if name in at else None)  # type: ignore[misc]
            for group in together(block.products):
                found.add(group, self._scales(group, weights, moments[group[0].read]), self.folds[group[0].read], moments[group[0].read])
        return found

    def _scales(self, group: Sequence[Product], weights: Values, moments: Moments) -> Tensor:
        fold = self.folds[group[0].read]
        if isinstance(fold, str):
            return torch.ones_like(moments.absolute)
        parts = [(outputs_first(product, weights), self.schemes[product.weight]) for product in group]
        return channel_scales(parts, moments, fold.shared)


class _Found:
    """Scales by the weights that are multiplied and divided by them, divisors of vectors, and the mean squares of what is read."""

    def __init__(self) -> None:
        self.columns: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.vectors: dict[str, tuple[float, Tensor]] = {}

    def add(self, group: Sequence[Product], scales: Tensor, fold: Fold | str, moments: Moments) -> None:
        for product in group:
            self.columns[product.weight] = scales
            self.squares[product.weight] = moments.second.diagonal() / scales.square()
        if isinstance(fold, Fold):
            divisors = fold.divisors(scales)
            self.vectors |= {name: (offset, divisors) for name, offset in fold.vectors}
            if fold.rows:
                self.rows[fold.rows] = divisors


class Gptq:
    """Weights rounded so that columns make up for each other's errors; they are kept in files until they are read.

    Every product is measured on what it reads after all products before it are rounded, those of its own layer too.
    """

    def __init__(
        self, model: TracedModel, rows: Rows, products: Sequence[Product], schemes: Mapping[str, Scheme], scratch: Path | None = None
    ) -> None:
        self.model, self.rows, self.products, self.schemes, self.scratch = model, rows, products, schemes, scratch

    divided: Sequence[str] = ()
    left: Sequence[tuple[str, str]] = ()

    def quantized(self, name: str, weight: Tensor) -> Quantized:
        """Return the integers that were found for the weight."""
        kept = torch.load(self._folder / f"{name}.pt", weights_only=True)
        scheme = self.schemes[name]
        group = scheme.group or weight.shape[1]
        assert kept["packed"].shape[1] * group == weight.shape[1], name
        return Quantized(unpack(kept["packed"], scheme.bits, weight.shape[1]).view(scheme.dtype), kept["scale"], kept["zero_point"])

    def vector(self, name: str, value: Tensor) -> Tensor:
        """Return the vector as it is."""
        return value

    @cached_property
    def _folder(self) -> Path:
        """The folder with a file for each weight; it goes when this does."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch, prefix="calque-gptq-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        stream = Stream(self.model, self.rows, self.products)
        for block in stream.blocks:
            weights = stream.read(block)
            for group in together(block.products):
                self._round(stream, block, weights, group, folder)
            stream.pass_through(block, weights)
        return folder

    def _round(self, stream: Stream, block: Block, weights: Values, group: Sequence[Product], folder: Path) -> None:
        """Let the group's products go on with rounded weights, which are in files."""
        moments = Moments()
        stream.show(block, weights, group[0], moments.add)
        for product in group:
            scheme = self.schemes[product.weight]
            made = gptq(outputs_first(product, weights), moments.second, scheme)
            packed = pack(made.q, scheme.bits, scheme.group or made.q.shape[1])
            torch.save({"packed": packed, "scale": made.scale, "zero_point": made.zero_point}, folder / f"{product.weight}.pt")
            rounded = dequantize(made.q, made.scale, made.zero_point, scheme.group)
            weights[product.parameter] = rounded.t() if product.inputs_first else rounded


def outputs_first(product: Product, weights: Values) -> Tensor:
    """Return the weight of a product as float32 [out, in]."""
    weight: Tensor = weights[product.parameter].to(torch.float32)
    return weight.t().contiguous() if product.inputs_first else weight
