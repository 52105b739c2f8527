"""The same ONNX file run without rounding activations: what proves its integers and its graph apart from how products round.

MatMulNBits and QMoE round what they multiply to 8 bits where their ``accuracy_level`` is 4. At level 0 they compute in float32 with
the same weights, and agree with the eager model as closely as a float32 artifact does. QMoE of 8 bits rounds at every level; it
takes another way where ONNX Runtime's own switch, an environment variable, is off while the session is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calque.runtime.onnxruntime_session import OnnxRuntimeSession

LEVEL, ROUNDED = "accuracy_level", 4
# The operators that have it.
LEVELLED = ("MatMulNBits", "QMoE")
# Source: onnxruntime/contrib_ops/cpu/moe/moe_quantization_cpu.cc@1.31.
SWITCH = "ORT_QMOE_CPU_QNBIT_GEMM"


class ExactSession(OnnxRuntimeSession):
    """Runs an artifact's graphs with the level of accuracy taken out; its weights are read from the artifact's own files."""

    def opened(self, graph: str) -> Any:
        """Return ONNX Runtime's session of ``graph``, whose experts round nothing either."""
        with _switched_off():
            return super().opened(graph)

    def model(self, path: Path) -> str | bytes:
        """Return the bytes of the graph without levels."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            kept = [attribute for attribute in node.attribute if attribute.name != LEVEL]
            del node.attribute[:]
            node.attribute.extend(kept)
        return bytes(model.SerializeToString())


@contextmanager
def _switched_off() -> Iterator[None]:
    """Keep experts from kernels that round, for sessions that are made inside the block."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
