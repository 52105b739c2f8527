"""Products of 8-bit integers in TorchScript: the operators of torch.ao's kernels, over integers as Calque makes them.

::

    calque.dynamic_linear(%x, %q, %scale, %b)         quantized.linear_dynamic(v_x, self.packed, False)
    calque.dequantize_lookup(%ids, %q, %scale, …)     aten.dequantize(aten.index_select(self.table, 0, v_ids)) · scales of the rows

A packed weight is an object of torch's, which an engine makes of integers, scales and a bias. Packed by ``qnnpack`` it reads
memory that a table may read too, so that a tied head is saved once, and any engine loads it; other engines make copies of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from calque.targets._torchscript import Writer

if TYPE_CHECKING:
    from calque.traced import TracedModel

ENGINE = "qnnpack"
DYNAMIC_LINEAR, LOOKUP = torch.ops.calque.dynamic_linear.default, torch.ops.calque.dequantize_lookup.default
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
    parts = tuple(part for part in (q, scale, bias) if isinstance(part, Node))
    weight = _weight(writer, q)
    packed = writer.attribute(f"{weight}.packed", parts, packed_weight, kept=True, weight=weight)
    return f"torch.ops.quantized.linear_dynamic({writer.value(x)}, {packed}, False)"


def write_lookup(writer: Writer, node: Node) -> str:
    """Return the line that takes rows out of a table, and multiplies each by its scale."""
    arguments: Any = node.args
    ids, q, scale, _, axis, _ = arguments
    assert isinstance(ids, Node)
    assert isinstance(q, Node)
    weight = _weight(writer, q)
    table = writer.attribute(f"{weight}.table", (q,), columns_table if axis else rows_table, kept=True, weight=weight)
    given, flat, out = writer.value(ids), f"{writer.fresh(node)}_ids", node.meta["val"]
    writer.line(node, f"{flat} = torch.ops.aten.reshape({given}, [-1])")
    scales = f"torch.ops.aten.unsqueeze(torch.ops.aten.index_select({writer.value(scale)}, 0, {flat}), 1)"
    rows = f"torch.ops.aten.mul(torch.ops.aten.dequantize(torch.ops.aten.index_select({table}, 0, {flat})), {scales})"
    sizes = [f"{given}.size({at})" for at in range(out.dim() - 1)]
    return f"torch.ops.aten.view({rows}, [{', '.join(sizes)}, {out.shape[-1]}])"


def _weight(writer: Writer, q: Node) -> str:
    """Return the name that the weight of these integers had in the checkpoint."""
    return str(writer.held[q.name].removesuffix(".transposed").removesuffix(INTEGERS))


def packed_weight(q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """Return the packed weight of integers q int8 [in, out], scales [out] and a bias [out]; it reads the memory of q."""
    rows = q.t().contiguous()
    zeros = torch.zeros_like(scale, dtype=torch.int64)
    integers = torch._empty_per_channel_affine_quantized(
        list(rows.shape), scales=scale.double(), zero_points=zeros, axis=0, dtype=torch.qint8
    )
    integers.set_(rows.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())
    return torch.ops.quantized.linear_prepack(integers, bias)


def rows_table(q: Tensor) -> Tensor:
    """Return a table of integers [entries, size] as a quantized tensor of scale 1 that reads its memory.

    Rows of such a one can be taken out. It is of one type with a packed weight, as what shares memory must be in a file.
    """
    table = torch._empty_affine_quantized(list(q.shape), scale=1.0, zero_point=0, dtype=torch.qint8)
    return table.set_(q.untyped_storage(), q.storage_offset(), q.shape, q.stride())


def columns_table(q: Tensor) -> Tensor:
    """Return the table whose entries are the columns of q [size, entries]."""
    return rows_table(q.t().contiguous())


def by_rows(writer: Writer, tensors: dict[Node, Tensor]) -> None:
    """Integers [in, out] lie in memory as rows of an output each, so that all that is made of one weight shares them."""
    for held in writer.attributes.values():
        if held.make in (packed_weight, columns_table):
            tensors[held.parts[0]] = tensors[held.parts[0]].t().contiguous().t()


def own(model: TracedModel) -> dict[Any, Any]:
    """Return how the operators are written that stay whole: lookups only where each row has one scale and no zero point."""
    lookups = [node for node in model.graph.nodes if node.target is LOOKUP]
    plain = all(node.args[3] is None and node.args[5] == 0 and isinstance(node.args[1], Node) for node in lookups)
    return {DYNAMIC_LINEAR: write_dynamic_linear, **({LOOKUP: write_lookup} if plain else {})}
