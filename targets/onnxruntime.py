"""ONNX Runtime: one ONNX file with its weights beside it, for prefill and decode alike.

::

    model.onnx          the graph, opset 23; 24 with a static cache
    model.onnx.data     the weights, tied ones once, written some rows of one tensor at a time
    genai_config.json   of a causal language model that onnxruntime-genai knows

With ``layout: transformers.js`` the first two are ``onnx/model.onnx`` and ``onnx/model.onnx_data``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from calque.artifact import Artifact, GraphSpec
from calque.choices import NARROW, QUANTIZED
from calque.errors import TargetUnavailable, UsageError
from calque.passes import Pass
from calque.targets import Emitted, Problem, package_rows
from calque.threads import one_thread

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig

    from calque.session import Session
    from calque.targets._standard import Table
    from calque.traced import TracedModel

FILE = "model.onnx"
DATA = "model.onnx.data"


@dataclass(frozen=True)
class OnnxRuntime:
    """``operators``: ``fused`` are ONNX Runtime's own, ``standard`` run on any runtime of their opset.

    ``padding``: where a row of a batch may have some. ``right`` and ``none`` let attention turn queries and keys by itself.
    ``cache``: ``dynamic`` grows from call to call, ``static`` is slots that are written in place, ``dims.max_length`` of them.
    ``activations``: what int4 and int8 multiply: values rounded to 8 bits, group by group (``int8``) or all of a call alike
    (``dynamic``, of int8 alone), or float32 as they are.
    ``arithmetic``: what fp16 and bf16 compute in: their own type, or float32 with weights alone stored in theirs.
    """

    operators: Literal["fused", "standard"] = "fused"
    padding: Literal["any", "right", "none"] = "any"
    cache: Literal["dynamic", "static"] = "dynamic"
    arithmetic: Literal["narrow", "float32"] = "narrow"
    activations: Literal["int8", "dynamic", "float32"] = "int8"

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.operators == "standard" and self.padding != "any":
            raise ValueError(f"padding: {self.padding} belongs to operators: fused; standard ones take padding anywhere")
        if self.cache == "static" and self.padding == "none":
            raise ValueError("padding: none belongs to cache: dynamic; slots take padding on the right")
        if self.operators == "standard" and self.activations == "float32":
            raise ValueError(
                "activations: float32 belongs to operators: fused; of standard ones the runtime says how it multiplies integers"
            )

    name: ClassVar[str] = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16", "int8", "int8-static", "int4")

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order.

        Raises:
            UsageError: an option that the precision does not go with.
        """
        from calque.passes.cache_dynamic import CacheDynamic
        from calque.passes.cache_static import CacheStatic
        from calque.passes.cast_precision import CastPrecision
        from calque.passes.drop_zero_bias import DropZeroBias
        from calque.passes.fuse_gelu import FuseGelu
        from calque.passes.fuse_grouped_attention import FuseGroupedAttention
        from calque.passes.fuse_layer_norm import FuseLayerNorm
        from calque.passes.fuse_residual_norm import FuseResidualNorm
        from calque.passes.fuse_rms_norm import FuseRmsNorm
        from calque.passes.fuse_rotary import FuseRotary
        from calque.passes.merge_qkv import MergeQkv
        from calque.passes.simplify_shapes import SimplifyShapes
        from calque.passes.transpose_linear import TransposeLinear

        # Last: casts would stand between what the others look for, and tables that they make are weights too.
        cast = (CastPrecision(NARROW[precision], self.arithmetic),) if precision in NARROW else ()
        quantize, pack = self._integers(precision) if precision in QUANTIZED else ((), ())
        cache = CacheStatic() if self.cache == "static" else CacheDynamic()
        if self.operators == "standard":
            # What follows, in operators of the standard.
            written = (FuseGelu(), FuseRmsNorm(), FuseLayerNorm(), FuseRotary())
            return (*quantize, DropZeroBias(), *written, cache, SimplifyShapes(), *pack, TransposeLinear(), *cast)
        joined = (
            *quantize,  # first, while parameters have the names of the checkpoint
            DropZeroBias(),  # an addition less for each
            FuseGelu(),  # up to eight operators an activation become one
            FuseRmsNorm(),  # five operators a norm become one
            FuseLayerNorm(),  # so do eight of a layer norm that is written out
            FuseRotary(),  # ten operators a head turned become one
            FuseResidualNorm(),  # a norm reads the sum before it once
        )
        if self.cache == "static":
            return (*joined, cache, SimplifyShapes(), *pack, TransposeLinear(), *cast)  # the standard's attention reads slots
        return (
            *joined,
            cache,  # past in, present out: the convention of every ONNX Runtime consumer
            FuseGroupedAttention(self.padding),  # the cache is grown where it is read, not copied before
            MergeQkv(),  # one product where three read the same values
            SimplifyShapes(),  # what is left of shapes, mostly of models whose attention is their own
            *pack,  # the operators read bytes, or integers [in, out]
            TransposeLinear(),  # MatMul reads [in, out]; a transposed constant would be copied when the session loads
            *cast,
        )

    def _integers(self, precision: str) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
        """Return the passes that make integers of numbers, and those that lay them out for the operators that read them."""
        from calque.passes.fuse_experts import FuseExperts
        from calque.passes.lay_out_integers import LayOutIntegers
        from calque.passes.pack_weights import PackWeights
        from calque.passes.quantize_activations import QuantizeActivations
        from calque.passes.quantize_weights import QuantizeWeights

        if (self.activations != "int8" and precision == "int8-static") or (self.activations == "dynamic" and precision != "int8"):
            raise UsageError(f"activations: {self.activations} does not go with precision: {precision}", fix="leave one of the two out")
        # Of experts, those that a token chose run, and no others.
        experts = (FuseExperts(rounded=self.activations == "int8"),) if self.operators == "fused" else ()
        weights = (QuantizeWeights(**QUANTIZED[precision]), *experts)
        if precision == "int8-static":
            # Ranges first: they are those of the model as it was trained.
            return (QuantizeActivations("static"), *weights), (LayOutIntegers(),)
        if self.activations == "dynamic":
            return (QuantizeActivations("dynamic"), *weights), (LayOutIntegers(),)
        return weights, (LayOutIntegers() if self.operators == "standard" else PackWeights(),)

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return the nodes that have no ONNX translation."""
        from calque.targets import _to_onnx

        return _to_onnx.problems(model, self._table())

    def lower(self, model: TracedModel) -> ir.Model:
        """Return the ONNX model; its weights are still where the checkpoint has them."""
        import onnx_ir as ir

        from calque.targets import _to_onnx
        from calque.targets._exact import LEVEL, LEVELLED, ROUNDED

        lowered = _to_onnx.to_onnx(model, self._table())
        if self.activations == "int8":
            for node in lowered.graph:
                if node.op_type in LEVELLED:
                    node.attributes[LEVEL] = ir.AttrInt64(LEVEL, ROUNDED)
        return lowered

    def _table(self) -> Table:
        from calque.targets import _contrib, _standard

        return _contrib.CONTRIB if self.operators == "fused" else _standard.STANDARD

    def emit(self, lowered: ir.Model, model: TracedModel, folder: Path) -> Emitted:
        """Write model.onnx and model.onnx.data; some rows of one tensor are in memory at a time."""
        import onnx_ir as ir

        with one_thread():
            ir.save(lowered, folder / FILE, external_data=DATA)
        graph = GraphSpec(FILE, model.inputs, model.outputs)
        # What the operators cannot do, the pass that puts them there says in the limits.
        return Emitted({"model": graph}, model.limits)

    def layouts(self, precision: str) -> tuple[str, ...]:
        """Return flat, and transformers.js where that has a name for the precision."""
        from calque.targets._transformers_js import DTYPES

        return ("flat", "transformers.js") if precision in DTYPES and self.cache == "dynamic" else ("flat",)

    def finish(self, artifact: Artifact, config: PreTrainedConfig) -> tuple[Artifact, list[str]]:
        """Return the artifact in the layout its recipe asks for, with genai_config.json where onnxruntime-genai can run it."""
        from calque.targets import _genai, _transformers_js

        if artifact.recipe.get("layout") == "transformers.js":
            artifact = _transformers_js.arrange(artifact, DATA)
        return artifact, _genai.write(artifact, config)

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of ONNX Runtime on this machine's CPU.

        Raises:
            TargetUnavailable: the CPU has no kernels for the artifact's precision.
        """
        from calque.runtime.onnxruntime_session import OnnxRuntimeSession
        from calque.targets._kernels import without_bfloat16

        if artifact.precision == "bf16":
            for graph in artifact.graphs.values():
                if missing := without_bfloat16(artifact.folder / graph.file):
                    raise TargetUnavailable(
                        f"ONNX Runtime's CPU has no bfloat16 kernel of {', '.join(missing)}",
                        fix="run it where ONNX Runtime has them, as on CUDA, or set arithmetic: float32",
                    )
        return OnnxRuntimeSession(artifact, threads)

    def exact(self, artifact: Artifact, threads: int = 0) -> Session | None:
        """Return a session over the artifact that rounds no activations; None where it rounds none itself."""
        from calque.targets._exact import ExactSession

        return ExactSession(artifact, threads) if artifact.precision in QUANTIZED and self.activations != "float32" else None

    def blocks(self, artifact: Artifact, threads: int, nbytes: int, exact: bool = False) -> Session:
        """Return a session that holds about ``nbytes`` of weights at a time; ``exact``: it rounds no activations."""
        from calque.targets._blocks import BlockSession

        return BlockSession(artifact, threads, nbytes, exact)

    def integers(self, artifact: Artifact) -> dict[str, tuple[NDArray[np.int8], NDArray[np.generic]]]:
        """Return q int8 [out, in] and scale [out, groups] of every matrix of integers, by the name of its weight."""
        from calque.targets._onnx_integers import integers

        return integers(artifact.folder / artifact.graphs["model"].file)

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return the packages that emitting and running take."""
        return package_rows({"onnxruntime": "to run", "torch": "to convert", "onnx-ir": "to convert", "onnxscript": "to convert"})


TARGET = OnnxRuntime
