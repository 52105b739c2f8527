"""A file in operators of the standard, run by ONNX Runtime as it says, though it was made for another runtime."""

from __future__ import annotations

from typing import Any

from calque.runtime.onnxruntime_session import OnnxRuntimeSession

# At which level ONNX Runtime rounds what it multiplies with integers where it joins DequantizeLinear and MatMul; 0: not at all.
LEVEL_SETTING = "session.qdq_matmulnbits_accuracy_level"

# The file that the artifact's was expanded from, where it holds operators of its runtime's own.
OWN = "model.trt.onnx"


class StandardSession(OnnxRuntimeSession):
    """Rounds nothing that the file does not round: products join no integers in ways of ONNX Runtime's own."""

    @property
    def by(self) -> str:
        """What proves an artifact's numbers by answering: its file, or one whose attention was written back in the standard's."""
        return "expanded" if (self.artifact.folder / OWN).is_file() else "onnxruntime"

    def configure(self, options: Any) -> None:
        """Let ONNX Runtime join no products that round."""
        options.add_session_config_entry(LEVEL_SETTING, "0")
