"""ONNX Runtime: one ONNX file in standard operators with its weights beside it, for prefill and decode alike.

::

    model.onnx          the graph, opset 23
    model.onnx.data     the weights, tied ones once, written one tensor at a time
    genai_config.json   of a causal language model that onnxruntime-genai knows

With ``layout: transformers.js`` the first two are ``onnx/model.onnx`` and ``onnx/model.onnx_data``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from calque.artifact import Artifact, GraphSpec
from calque.passes import Pass
from calque.targets import Emitted, Problem, package_rows

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedConfig

    from calque.session import Session
    from calque.traced import TracedModel

FILE = "model.onnx"
DATA = "model.onnx.data"


@dataclass(frozen=True)
class OnnxRuntime:
    """``operators``: which operators attention and norms are lowered to; ``standard`` runs on any ONNX runtime."""

    operators: Literal["standard"] = "standard"

    name: ClassVar[str] = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order."""
        from calque.passes.cache_dynamic import CacheDynamic
        from calque.passes.transpose_linear import TransposeLinear

        return (
            CacheDynamic(),  # past in, present out: the convention of every ONNX Runtime consumer
            TransposeLinear(),  # MatMul reads [in, out]; a transposed constant would be copied when the session loads
        )

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return the nodes that have no ONNX translation."""
        from calque.targets import _to_onnx

        return _to_onnx.problems(model, _to_onnx.STANDARD)

    def lower(self, model: TracedModel) -> ir.Model:
        """Return the ONNX model; its weights are still where the checkpoint has them."""
        from calque.targets import _to_onnx

        return _to_onnx.to_onnx(model)

    def emit(self, lowered: ir.Model, model: TracedModel, folder: Path) -> Emitted:
        """Write model.onnx and model.onnx.data; one tensor is in memory at a time."""
        import onnx_ir as ir

        ir.save(lowered, folder / FILE, external_data=DATA)
        graph = GraphSpec(FILE, model.inputs, model.outputs)
        # Standard operators take the mask and positions of the trace: what the trace is exact for, the artifact is.
        return Emitted({"model": graph}, model.limits)

    def layouts(self, precision: str) -> tuple[str, ...]:
        """Return flat, and transformers.js where that has a name for the precision."""
        from calque.targets._transformers_js import DTYPES

        return ("flat", "transformers.js") if precision in DTYPES else ("flat",)

    def finish(self, artifact: Artifact, config: PreTrainedConfig) -> tuple[Artifact, list[str]]:
        """Return the artifact in the layout its recipe asks for, with genai_config.json where onnxruntime-genai can run it."""
        from calque.targets import _genai, _transformers_js

        if artifact.recipe.get("layout") == "transformers.js":
            artifact = _transformers_js.arrange(artifact, DATA)
        return artifact, _genai.write(artifact, config)

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of ONNX Runtime on this machine's CPU."""
        from calque.runtime.onnxruntime_session import OnnxRuntimeSession

        return OnnxRuntimeSession(artifact, threads)

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return the packages that emitting and running take."""
        return package_rows({"onnxruntime": "to run", "torch": "to convert", "onnx-ir": "to convert", "onnxscript": "to convert"})


TARGET = OnnxRuntime
