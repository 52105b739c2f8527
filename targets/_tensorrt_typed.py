"""A lowered graph with the types and shapes that follow from its inputs, and questions to it. No weight is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as stock
from numpy.typing import NDArray

from calque.targets._to_onnx import SOURCE

Dims = tuple[int | str | None, ...]
FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE})
# Operators of TensorRT's own that give what is like their first input.
LIKE_FIRST = frozenset({"TRT_Attention", "TRT_KVCacheUpdate", "TRT_QuantizedAttention"})
SLOT_WRITES = frozenset({"TensorScatter", "TRT_KVCacheUpdate"})
# What hands on the values that it is given, in another order, shape or type.
HANDING_ON = frozenset({"Cast", "CastLike", "Concat", "Expand", "Flatten", "Gather", "Identity", "Mul", "Reshape", "Slice", "Split",
                        "Squeeze", "Tile", "Transpose", "Unsqueeze"})  # fmt: skip


def typed(lowered: ir.Model) -> ir.Model:
    """Return a copy whose functions are inlined and whose values have the types and shapes that follow; the model stays as it is."""
    copy = lowered.clone()
    for value in copy.graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor) and not value.const_value.shape.dims:
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)  # a number: the scale or zero point of activations
        elif isinstance(value.const_value, ir.LazyTensor):
            # Gigabytes in all. Inference takes its type and shape alone, as it takes those of an input.
            value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
            value.const_value = None
    stock.InlinePass()(copy)
    for node in copy.graph.all_nodes():
        copy.opset_imports.setdefault(node.domain, 1)  # without which inference stops where it meets the domain
    _infer(copy)
    return copy


def _infer(model: ir.Model) -> None:
    """Give values the types and shapes that follow; TensorRT's own attention, which inference does not know, gives its queries' own."""
    own = [(node, node.op_type, node.domain, node.inputs) for node in model.graph.all_nodes() if node.op_type in LIKE_FIRST]
    for node, _, _, _ in own:
        node.op_type, node.domain = "Identity", ""
        node.resize_inputs(1)
    stock.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for node, kind, domain, inputs in own:
        node.op_type, node.domain = kind, domain
        node.resize_inputs(len(inputs))
        for place, value in enumerate(inputs):
            node.replace_input_with(place, value)


def dims(value: ir.Value | None) -> Dims | None:
    """Return the dimensions, numbers or names, None where one is not known; None where not even their count is."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def last(value: ir.Value | None) -> int | None:
    """Return the size of the last dimension where it is a number."""
    known = dims(value)
    return known[-1] if known and isinstance(known[-1], int) else None


def given(node: ir.Node, place: int) -> ir.Value | None:
    """Return an input, None where it was left out."""
    return node.inputs[place] if place < len(node.inputs) else None


def number(node: ir.Node, name: str, default: Any = 0) -> Any:
    """Return the value of an attribute, the default where it was left out."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return what a constant of the graph holds; None of what is computed, and of weights, which are not read."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or isinstance(tensor, ir.LazyTensor) else np.asarray(tensor.numpy())


def settled(value: ir.Value | None) -> bool:
    """Return whether a value is the same in every call: an initializer, a constant, or what is computed of them."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        found = waiting.pop()
        producer = None if found is None else found.producer()
        if found is None or found in seen or found.is_initializer() or (producer is not None and producer.op_type == "Constant"):
            continue
        if producer is None or not producer.inputs:
            return False  # an input of the graph or of a body, or drawn at random
        seen.add(found)
        waiting += producer.inputs
    return value is not None


def from_slots(value: ir.Value | None) -> bool:
    """Return whether a value is what a write into slots gave, in whatever shape."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type in SLOT_WRITES:
            return True
        value = given(producer, 0) if producer.op_type in HANDING_ON else None
    return False


def place_of(node: ir.Node, inside: Mapping[Any, ir.Node]) -> tuple[str, str]:
    """Return the module path and the source line of a node; of one that has none, those of the nearest that reads or feeds it.

    ``inside``: the node whose branch or body a graph is.
    """
    seen, waiting = {node}, deque([node])
    while waiting:
        found = waiting.popleft()
        if SOURCE in found.meta:
            place: tuple[str, str] = found.meta[SOURCE]
            return place
        outer = [inside[found.graph]] if found.graph is not None and found.graph in inside else []
        for near in (*_beside(found), *outer):
            if near not in seen:
                seen.add(near)
                waiting.append(near)
    return "", ""


def bodies(node: ir.Node) -> list[ir.Graph]:
    """Return the branches or the body of a node that has some."""
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]


def _beside(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes that read what it gives, and those that give what it reads."""
    for output in node.outputs:
        yield from output.consumers()
    for value in node.inputs:
        if value is not None and (producer := value.producer()) is not None:
            yield producer
