"""A file with TensorRT's own attention, written back in the standard's: what any runtime of opset 24 computes of it.

::

    in the file     y = trt::TRT_Attention(q, k, v, , , lengths)       causal_kind lower_right, upper_left or none
    expanded        seen = slot <= query + lengths - S                 lower_right: query i is at the slot lengths - S + i
                    seen = slot <= query and slot < lengths            upper_left: query i is at the slot i
                    seen = slot < lengths                              none
                    y = Attention(q, k, v, seen, scale=1)              the queries are multiplied by the scale before

Each kind means what TensorRT says that it means, not what would be right: a file that asks for the wrong one gives wrong numbers here
as it does there. Source: ``CausalMaskKind`` and ``IAttention`` of TensorRT 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from calque.errors import Unsupported
from calque.targets._tensorrt_table import DOMAIN, PREFIX_ATTENTION

KINDS = ("lower_right", "upper_left", "none")
Made = dict[tuple[str, str], ir.Value]


def expand(model: ir.Model) -> int:
    """Return how many attentions were TensorRT's own; the model has none of them any more.

    Raises:
        Unsupported: one whose inputs or kind have no meaning here.
    """
    found = [node for node in model.graph if node.domain == DOMAIN and node.op_type == PREFIX_ATTENTION]
    masks: Made = {}
    for node in found:
        _Attention(model.graph, node, masks).expand()
    model.opset_imports.pop(DOMAIN, None)
    return len(found)


@dataclass
class _Attention:
    """One attention on its way to the standard's; ``masks``: those made before, by kind and lengths."""

    graph: ir.Graph
    node: ir.Node
    masks: Made
    made: list[ir.Node] = field(default_factory=list)

    def expand(self) -> None:
        """Put the standard's attention in the place of TensorRT's."""
        q, k, v, mask, query_lengths, lengths = (*self.node.inputs, *[None] * 6)[:6]
        kind = self.node.attributes.get_string("causal_kind", "none")
        if mask is not None or query_lengths is not None or kind not in KINDS or None in (q, k, v):
            what = f"{self.node.name}: {PREFIX_ATTENTION} of kind {kind} with these inputs has no form in the standard"
            raise Unsupported(what, fix="report this: Calque writes lower_right with lengths alone")
        key = (kind, lengths.name or "" if lengths is not None else "")
        if key not in self.masks and (kind != "none" or lengths is not None):
            self.masks[key] = self._mask(kind, q, k, lengths)
        [out] = self.node.outputs
        attention = ir.Node("", "Attention", [q, k, v, self.masks.get(key)], ir.convenience.convert_attributes({"scale": 1.0}))
        attention.name = self.node.name
        attention.outputs[0].type, attention.outputs[0].shape = out.type, out.shape
        self.made.append(attention)
        self.graph.insert_before(self.node, self.made)
        out.replace_all_uses_with(attention.outputs[0], replace_graph_outputs=True)
        attention.outputs[0].name, out.name = out.name, None
        self.graph.remove(self.node, safe=True)

    def _mask(self, kind: str, q: Any, k: Any, lengths: Any) -> ir.Value:
        """Return which keys each query sees, bool [B or 1, 1, S, M]."""
        new, slots = self._op("Shape", [q], start=2, end=3), self._op("Shape", [k], start=2, end=3)
        slot = self._counted(slots)
        told = None if lengths is None else self._op("Unsqueeze", [self._op("Cast", [lengths], to=7), self._ints(1, 2, 3)])
        query = self._op("Unsqueeze", [self._counted(new), self._ints(0, 1, 3)])
        if kind == "none":
            # As many rows as there are queries, which runtimes ask of a mask.
            return self._op("Less", [slot, self._op("Add", [told, self._op("Sub", [query, query])])])
        if kind == "upper_left":
            seen = self._op("LessOrEqual", [slot, query])
            return seen if told is None else self._op("And", [seen, self._op("Less", [slot, told])])
        before = self._op("Sub", [slots if told is None else told, new])
        return self._op("LessOrEqual", [slot, self._op("Add", [query, before])])

    def _counted(self, size: ir.Value) -> ir.Value:
        """Return 0, 1, … below ``size`` [1]."""
        return self._op("Range", [self._scalar(0), self._op("Squeeze", [size]), self._scalar(1)])

    def _op(self, name: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        node = ir.Node("", name, inputs, ir.convenience.convert_attributes(attributes))
        # The first output says whose mask it is: names are in the file, so they follow from the file's own.
        node.name = f"{self.node.name}_{len(self.made)}_{name}"
        node.outputs[0].name = node.name + "_out"
        self.made.append(node)
        return node.outputs[0]

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _scalar(self, value: int) -> ir.Value:
        return self._constant(np.array(value, np.int64))

    def _constant(self, array: Any) -> ir.Value:
        name = f"expanded_{'_'.join(map(str, array.reshape(-1)))}_of_{array.ndim}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]
