"""Which operators of an ONNX file have no kernel on ONNX Runtime's CPU, asked of ONNX Runtime itself.

It adds casts of its own where float16 has no kernel, and none where bfloat16 has none: such a file cannot be opened here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPU = "CPUExecutionProvider"
# How ONNX Runtime calls the type in its kernels' constraints.
BFLOAT16 = "tensor(bfloat16)"


def without_bfloat16(path: Path) -> list[str]:
    """Return the operators that are given bfloat16 in the file and have no kernel for it, by name; empty if it can be run."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    narrow = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16}
    narrow |= {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16}
    given = {node.op_type for node in graph.node if narrow.intersection(node.input)}
    return sorted(given - _with_bfloat16())


@cache
def _with_bfloat16() -> frozenset[str]:
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    kernels = (kernel for kernel in runtime.get_all_opkernel_def() if kernel.provider == CPU)
    return frozenset(kernel.op_name for kernel in kernels if any(BFLOAT16 in types for types in kernel.type_constraints.values()))
