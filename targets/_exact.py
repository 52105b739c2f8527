"""The same ONNX file run without rounding activations: what proves its integers and its graph apart from how products round.

MatMulNBits rounds what it multiplies to 8 bits where its ``accuracy_level`` is 4. At level 0 it computes in float32 with the
same weights, and agrees with the eager model as closely as a float32 artifact does.
"""

from __future__ import annotations

from pathlib import Path

from calque.runtime.onnxruntime_session import OnnxRuntimeSession

LEVEL, ROUNDED = "accuracy_level", 4


class ExactSession(OnnxRuntimeSession):
    """Runs an artifact's graphs with the level of accuracy taken out; its weights are read from the artifact's own files."""

    def model(self, path: Path) -> str | bytes:
        """Return the bytes of the graph without levels."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            kept = [attribute for attribute in node.attribute if attribute.name != LEVEL]
            del node.attribute[:]
            node.attribute.extend(kept)
        return bytes(model.SerializeToString())
