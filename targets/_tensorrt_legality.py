"""What TensorRT cannot express, refuses late, or gets wrong without a word: found in the lowered graph, before anything is built.

::

    operator       every node against the table of ``_tensorrt_operators``, in branches and bodies too
    types          what has no form in TensorRT, and operands of different types, which it does not promote
    attention-…    ``_tensorrt_attention``, slots-… and rotary-… too
    quantized-…    ``_tensorrt_quantized``

Each problem begins with the name of its rule and says where the node comes from in the model.

Source: onnx-tensorrt 11.1, docs/operators.md; what the parser and the builder of TensorRT-RTX 1.7.1 were seen to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from calque.targets import Problem
from calque.targets._tensorrt_attention import Fault, attention, own_attention, rotary, slots, top
from calque.targets._tensorrt_operators import opset, supported
from calque.targets._tensorrt_quantized import READERS, constants, linear
from calque.targets._tensorrt_typed import FLOATS, SLOT_WRITES, bodies, dims, given, number, place_of, settled, typed

# What values may be. Source: operators.md, "Supported ONNX Operators"; DOUBLE is left out, see ``_types``.
FORMS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "INT4", "UINT8", "BOOL", "FLOAT8E4M3FN", "FLOAT4E2M1"})
# What quantized codes may not be, the rules of quantized values say.
CODES = frozenset({"UINT4", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "INT2", "UINT2"})
# What takes floats of several types, as the parser of TensorRT-RTX 1.7.1 was seen to.
MIXING = frozenset({"BatchNormalization", "Cast", "CastLike", "Clip", "Dropout", "If", "Loop", "OneHot", "Pad", "Pow", "RMSNormalization",
                    "Resize", "Scan", *READERS})  # fmt: skip


def illegal(lowered: ir.Model, longest: int = 0) -> list[Problem]:
    """Return everything in a lowered graph that TensorRT cannot express, in the order of the graph; no weight is read.

    ``longest`` is how many tokens a call may bring, of the profiles; 0 if that is not known.
    """
    model = typed(lowered)
    nodes = list(model.graph.all_nodes())
    found: list[tuple[ir.Node | None, Fault]] = [(None, fault) for fault in _whole(model)]
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        found += [(_reader(value), fault) for fault in _form(value)]
    for node in nodes:
        found += [(node, fault) for fault in _faults(node, longest)]
    for value in model.graph.initializers.values():
        found += constants(value)
    inside = {body: node for node in nodes for body in bodies(node)}
    return [
        Problem((node.name or node.op_type) if node else "graph", *(place_of(node, inside) if node else ("", "")), f"{rule}: {why}", fix)
        for node, (rule, why, fix) in found
    ]


def _reader(value: ir.Value) -> ir.Node | None:
    return next(iter(value.consumers()), None)


def _whole(model: ir.Model) -> Iterator[Fault]:
    version = model.opset_imports.get("", 0)
    if version > opset():
        yield "opset", f"opset {version} is younger than the {opset()} that the operators' table speaks of", f"write opset {opset()}"


def _faults(node: ir.Node, longest: int) -> Iterator[Fault]:
    """Yield everything that is wrong with one node."""
    if node.domain not in ("", "ai.onnx") and not node.op_type.startswith("TRT_"):
        yield "operator", f"{node.domain}::{node.op_type} is no operator of TensorRT", "use operators of the standard"
        return
    if not supported().get(node.op_type, False):
        yield "operator", f"TensorRT's parser does not know {node.op_type}", _instead(node.op_type)
        return
    for output in node.outputs:
        yield from _form(output)
    yield from _mixed(node)
    if node.op_type in CHECKS:
        yield from CHECKS[node.op_type](node)
    if node.op_type in SLOT_WRITES:
        yield from slots(node, longest)


def _instead(kind: str) -> str:
    if kind in ("DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv"):
        return "quantize activations with ranges that were measured, as QuantizeLinear and DequantizeLinear: int8-static"
    return "use a model without it"


def _form(value: ir.Value) -> Iterator[Fault]:
    """Yield what has no form in TensorRT."""
    name = value.name or "a value"
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        yield "type", f"{name} is a {type(value.type).__name__}: sequences and optional values have no form", "use a model without it"
    elif value.dtype == ir.DataType.DOUBLE:
        yield "double", f"{name} is DOUBLE, which becomes FLOAT without a word", "compute in float32, or keep it out of the graph"
    elif value.dtype is not None and value.dtype.name not in FORMS | CODES:
        yield "type", f"{name} is {value.dtype.name}, which has no form", "use int32 or int64"


def _mixed(node: ir.Node) -> Iterator[Fault]:
    """Yield where operands are floats of different types."""
    if node.op_type in MIXING:
        return
    types = list(dict.fromkeys(value.dtype for value in node.inputs if value is not None and value.dtype in FLOATS))
    if len(types) > 1:
        why = f"{node.op_type} reads {' and '.join(dtype.name for dtype in types if dtype)}: TensorRT promotes nothing"
        yield "mixed-types", why, "cast the operands to one type"


def _control(node: ir.Node) -> Iterator[Fault]:
    """Yield what is wrong with a branch or a loop. Source: operators.md, If and Loop."""
    inner = bodies(node)
    if node.op_type == "If" and len(inner) == 2:
        for first, second in zip(inner[0].outputs, inner[1].outputs, strict=False):
            ranks = {len(shape) for shape in (dims(first), dims(second)) if shape is not None}
            if len(ranks) > 1:
                yield "branches", "both branches must give values of as many dimensions", "use a model without it"
            if first.name == second.name:
                yield "branches", f"both branches call what they give {first.name}", "give the branches' outputs different names"
    if node.op_type == "Loop" and inner:
        carried = len(node.inputs) - 2
        if len(node.outputs) > carried and not settled(given(node, 0)):
            yield "loop", "what a loop collects must have a length that is a number", "use a model whose loops can be unrolled"


def _scatter(node: ir.Node) -> Iterator[Fault]:
    """Yield what is wrong with ``ScatterND``. Source: operators.md."""
    if number(node, "reduction", "none") != "none":
        yield "scatter", "a reduction of ScatterND is refused", "use a model without it"


CHECKS: Mapping[str, Callable[[ir.Node], Iterator[Fault]]] = {
    "Attention": attention,
    "DequantizeLinear": linear,
    "If": _control,
    "Loop": _control,
    "QuantizeLinear": linear,
    "RotaryEmbedding": rotary,
    "ScatterND": _scatter,
    "TopK": top,
    "TRT_Attention": own_attention,
}
