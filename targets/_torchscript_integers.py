"""Products of 8-bit integers in TorchScript: the operators of torch.ao's kernels, over integers as Calque makes them.

::

    calque.dynamic_linear(%x, %q, %scale, %b)      torch.ops.quantized.linear_dynamic(v_x, self.packed, False)

A packed weight is an object of torch's, which an engine makes of integers, scales and a bias. Packed by ``qnnpack`` it is saved once,
and any engine reads it; those of other engines are saved twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from calque.targets._torchscript import Writer

ENGINE = "qnnpack"
DYNAMIC_LINEAR = torch.ops.calque.dynamic_linear.default
# What `quantize_weights` adds to a weight's name for its integers, and `lay_out_integers` where they lie [in, out].
INTEGERS = ".q"


@contextmanager
def packing() -> Iterator[None]:
    """Let weights be packed as they are saved once, whatever engine torch uses otherwise."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings():
            # The types of quantized tensors stay in torch as long as the operators that read packed weights.
            warnings.filterwarnings("ignore", message=".*quantized.*", category=UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before


def write_dynamic_linear(writer: Writer, node: Node) -> str:
    """Return the line of a product with a packed weight, which is an attribute of the module."""
    x, q, scale, bias = node.args
    assert isinstance(q, Node)
    parts = [part for part in (q, scale, bias) if isinstance(part, Node)]
    name = writer.held[q.name].removesuffix(".transposed").removesuffix(INTEGERS)
    packed = writer.attribute(f"{name}.packed", tuple(parts), packed_weight, kept=True)
    return f"torch.ops.quantized.linear_dynamic({writer.value(x)}, {packed}, False)"


def packed_weight(q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """Return the packed weight of integers q int8 [in, out], scales [out] and a bias [out]."""
    integers = torch._make_per_channel_quantized_tensor(q.t().contiguous(), scale.double(), torch.zeros_like(scale, dtype=torch.int64), 0)
    return torch.ops.quantized.linear_prepack(integers, bias)


OWN = {DYNAMIC_LINEAR: write_dynamic_linear}
