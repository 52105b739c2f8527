"""Rounds what products multiply to 8 bits, so that integers can be multiplied by integers.

::

    before  linear(%x, %w, %b)                                                        %x float32
    after   linear(calque.round_activations(%x), %w, %b)                              dynamic: the range of each call's %x
            linear(dequantize_linear(quantize_linear(%x, %s, %z), %s, %z), %w, %b)    static: %s, %z measured on text beforehand
    left    products of what is computed (attention's own), those that ``keep`` names; all of them in mode auto without a text

It goes before ``quantize_weights``: ranges are then those of the model as it was trained, found by the names of the checkpoint.
``lay_out_integers`` makes one product of it where the weight is of int8 per channel, and takes it back where the weight is not.
Of the format e4m3 what %x becomes in between is float8_e4m3fn, which goes with weights of that format.
One range holds for a whole tensor. The dynamic one reaches over all rows and positions of a call, padding too, so that what a
row gives depends on what else is in its batch; the static one does not.

Source: DynamicQuantizeLinear and QuantizeLinear of the ONNX standard; ranges as in Nagel et al., arXiv 2106.08295, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.fx import Node

from calque.activation_ranges import ActivationRange, Method, steps
from calque.calibration import observe
from calque.choices import AS_ASKED
from calque.errors import UsageError
from calque.passes import Rewrites
from calque.patterns import calls
from calque.products import PRODUCTS
from calque.quantization import Format
from calque.quantized_ops import RoundTrip
from calque.traced import call
from calque.weights import Derived

if TYPE_CHECKING:
    from calque.traced import TracedModel

calque = torch.ops.calque


@dataclass(frozen=True)
class QuantizeActivations:
    """``mode``: ranges of each call, or measured beforehand (``auto``: where there is a text, else nothing is rounded).

    ``calibration``: how ranges follow from what was measured; ``percentile``: how much of it lies inside, in percent. ``symmetric``:
    integers from -128 to 127 around 0, which TensorRT wants; else from 0 to 255. ``format``: integers, or e4m3, which is symmetric.
    ``keep``: patterns of the names of weights whose products stay as they are.
    """

    mode: Literal["dynamic", "static", "auto"] = "dynamic"
    calibration: Method = "mse"
    percentile: float = 99.999
    symmetric: bool = False
    keep: tuple[str, ...] = ()
    format: Format = "integers"

    after: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse what is no percentile, and dynamic ranges that are symmetric or of e4m3."""
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile: must be above 50 and at most 100; found {self.percentile}")
        if self.mode == "dynamic" and self.symmetric:
            raise ValueError("symmetric: dynamic ranges have a zero point of their own; it belongs to mode: static")
        if self.mode == "dynamic" and self.format == "e4m3":
            raise ValueError("format: e4m3 has ranges that are measured beforehand; it belongs to mode: static or auto")

    @property
    def calibrated(self) -> bool:
        """Whether a text must be there to measure ranges on."""
        return self.mode == "static"

    def apply(self, model: TracedModel) -> Rewrites:
        """Return one rewrite per product.

        Raises:
            UsageError: ranges are to be measured, and there is no text.
        """
        if self.mode == "auto" and not model.samples:
            return Rewrites(0)
        found, skipped = self._products(model)
        if not found:
            return Rewrites(0, tuple(skipped))
        readers: dict[Node, list[tuple[Node, str]]] = {}
        for product, name in found:
            value: Any = product.args[PRODUCTS[product.target].value]
            readers.setdefault(value, []).append((product, name))
        # What several products read is rounded once, and measured where the first of them reads it.
        ranges = self._measured(model, {first[0][1] for first in readers.values()}) if self.mode != "dynamic" else {}
        for value, read in readers.items():
            rounding = self._rounding(ranges[read[0][1]]) if ranges else None
            rounded = self._rounded(model, read[0][0], value, read[0][1], rounding)
            for product, name in read:
                product.replace_input_with(value, rounded)
                model.rounding[name] = rounding or calque.round_activations.default
        return Rewrites(len(found), tuple(skipped))

    def _products(self, model: TracedModel) -> tuple[list[tuple[Node, str]], list[tuple[str, str]]]:
        """Return the products with a weight, in order, each with the weight's name; and those that are kept."""
        names = {node: name for name, node in model.parameters().items() if len(model.weights[name].shape) == 2}
        found, kept = [], []
        for node in model.graph.nodes:
            if (places := PRODUCTS.get(node.target)) is None:
                continue
            weight, value = node.args[places.weight], node.args[places.value]
            if weight not in names or value in names or _is_rounded(value):
                continue
            if any(fnmatchcase(names[weight], pattern) for pattern in self.keep):
                kept.append((names[weight], AS_ASKED))
            else:
                found.append((node, names[weight]))
        return found, kept

    def _measured(self, model: TracedModel, names: set[str]) -> dict[str, ActivationRange]:
        if not model.samples:
            raise UsageError("static ranges of activations are measured on text, and none is given", fix="name one with --calibration FILE")
        key = ("ranges", frozenset(names), model.samples)
        if key not in model.calibrations:
            ranges = {name: ActivationRange() for name in names}

            def add(name: str, x: torch.Tensor) -> None:
                if name in ranges:
                    ranges[name].add(x)

            observe(model, model.samples, add)
            model.calibrations[key] = ranges
        measured: dict[str, ActivationRange] = model.calibrations[key]
        return measured

    def _rounding(self, measured: ActivationRange) -> RoundTrip:
        """Return what rounds a value as the nodes do."""
        bounds = measured.bounds(self.calibration, self.percentile, self.symmetric or self.format == "e4m3", self.format)
        scale, zero, _, _ = steps(*bounds, self.symmetric, self.format)
        integers = torch.int8 if self.symmetric else torch.uint8
        dtype = torch.float8_e4m3fn if self.format == "e4m3" else integers
        return RoundTrip(torch.tensor(scale), torch.tensor(zero, dtype=torch.float32).to(dtype))

    def _rounded(self, model: TracedModel, product: Node, value: Node, name: str, rounding: RoundTrip | None) -> Node:
        """Return the node that rounds a value, before the product that reads it first."""
        weight: Any = product.args[PRODUCTS[product.target].weight]
        if rounding is None:
            with model.graph.inserting_before(product):
                return call(model.graph, calque.round_activations.default, value)
        held = {"scale": rounding.scale, "zero_point": rounding.zero_point}
        constants = [_constant(model, f"{name}.input_{part}", number, weight) for part, number in held.items()]
        with model.graph.inserting_before(product):
            integers = call(model.graph, calque.quantize_linear.default, value, *constants)
            return call(model.graph, calque.dequantize_linear.default, integers, *constants, 8, 0, 0)


def _is_rounded(value: Any) -> bool:
    """Return whether a value is one that was rounded."""
    return calls(value, calque.round_activations.default) or calls(value, calque.dequantize_linear.default)


def _constant(model: TracedModel, name: str, number: torch.Tensor, like: Node) -> Node:
    """Return a new parameter that is one number."""
    dtype = str(number.dtype).removeprefix("torch.")
    return model.add_parameter(name, Derived((), f"calibrated({float(number):.9g})", number.clone, dtype, (), moved=False), like=like)
