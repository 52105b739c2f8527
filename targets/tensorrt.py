"""TensorRT: a file of the standard that ONNX Runtime proves, and all that builds and checks an engine of it.

::

    model.onnx, model.onnx.data     the graph in operators of opset 24, keys and values in slots: what is proved, and built
    model.trt.onnx                  the same with TensorRT's own attention, over the same data: ``attention: trt``
    profiles.json, build.json       how large inputs may be; what the builder is told, in names
    build_engine.py, trtexec.txt    build the engine, with nothing but TensorRT
    run_engine.py                   runs it on a GPU against reference/, and measures it
    model.plan                      the engine, where a builder is installed: TensorRT beside a GPU, or TensorRT-RTX without one

Source: the reference of TensorRT 11, and what the parser and builder of TensorRT-RTX 1.7.1 take.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calque.artifact import ENGINE, Artifact, GraphSpec, rounds_activations
from calque.choices import NARROW, QUANTIZED, Requirement
from calque.errors import TargetUnavailable
from calque.passes import Pass
from calque.runtime.standard_session import OWN
from calque.targets import Built, Emitted, Problem, optional_rows, package_rows
from calque.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig

    from calque.session import Session
    from calque.traced import TracedModel

FILE, DATA = "model.onnx", "model.onnx.data"


@dataclass(frozen=True)
class TensorRT:
    """``attention``: ``standard`` reads a mask; ``trt`` is told how many slots a row fills, where its mask says no more than that.

    ``profiles``: one for every call, or ``two``, of which one is of single steps: TensorRT-RTX nearly doubles the engine for it.
    ``sdk``: what builds; ``auto`` is TensorRT where it and a GPU are, else TensorRT-RTX, and ``none`` builds nothing here.
    ``via``: the engine is built from the ONNX file, or by torch-tensorrt from the traced program, on a machine with a GPU.
    """

    attention: Literal["standard", "trt"] = "standard"
    profiles: Literal["one", "two"] = "one"
    sdk: Literal["auto", "tensorrt", "tensorrt-rtx", "none"] = "auto"
    via: Literal["onnx", "torch-tensorrt"] = "onnx"

    name: ClassVar[str] = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32", "int8", "int8-static", "int4", "fp8")

    def require(self, needed: Requirement | None) -> None:
        """Leave quietly if what the options ask for is here, and what builds and runs engines where these are needed.

        Raises:
            TargetUnavailable: it is not.
        """
        from calque.targets import _tensorrt_build

        if self.via == "torch-tensorrt":
            from calque.targets import _torch_tensorrt

            return _torch_tensorrt.require()
        _tensorrt_build.require(self.sdk, needed)

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order."""
        from calque.passes.cache_static import CacheStatic
        from calque.passes.cast_precision import CastPrecision
        from calque.passes.drop_zero_bias import DropZeroBias
        from calque.passes.fuse_gelu import FuseGelu
        from calque.passes.fuse_layer_norm import FuseLayerNorm
        from calque.passes.fuse_prefix_attention import FusePrefixAttention
        from calque.passes.fuse_rms_norm import FuseRmsNorm
        from calque.passes.fuse_rotary import FuseRotary
        from calque.passes.lay_out_integers import LayOutIntegers
        from calque.passes.simplify_shapes import SimplifyShapes
        from calque.passes.transpose_linear import TransposeLinear

        quantized = precision in QUANTIZED
        # Weights belong to the precision; activations of those that quantize are float16, as of none that is named.
        narrow = "float16" if quantized else NARROW.get(precision)
        return (
            *(_quantize(precision) if quantized else ()),  # first, while parameters have the names of the checkpoint
            DropZeroBias(),  # an addition less for each
            FuseGelu(),  # up to eight operators an activation become one
            FuseRmsNorm(),  # five operators a norm become one
            FuseLayerNorm(),  # so do eight of a layer norm that is written out
            FuseRotary(),  # a layer of TensorRT's own
            CacheStatic(),  # slots, which TensorRT writes in place
            *((FusePrefixAttention(),) if self.attention == "trt" else ()),  # each step reads the slots that are filled
            SimplifyShapes(),  # shapes that are numbers to the builder
            *(
                (LayOutIntegers(tables="numbers"),) if quantized else ()
            ),  # integers in front of products, which is where the builder takes them
            TransposeLinear(),  # MatMul reads [in, out]
            *((CastPrecision(narrow),) if narrow else ()),  # last: casts stand between what others look for
        )

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return every node that TensorRT cannot express, or gets wrong without a word."""
        from calque.targets import _to_onnx
        from calque.targets._aten import lengths_of_values
        from calque.targets._tensorrt_legality import illegal
        from calque.targets._tensorrt_table import TENSORRT

        if untranslated := _to_onnx.problems(model, TENSORRT):
            return untranslated
        return [*lengths_of_values(model), *illegal(_to_onnx.to_onnx(model, TENSORRT))]

    def lower(self, model: TracedModel) -> ir.Model:
        """Return the ONNX model, with TensorRT's own attention where the passes put it; weights are still where the checkpoint has them."""
        from calque.targets import _to_onnx
        from calque.targets._tensorrt_table import TENSORRT

        return _to_onnx.to_onnx(model, TENSORRT)

    def emit(self, lowered: ir.Model, model: TracedModel, folder: Path) -> Emitted:
        """Write the files with the graph and the weights; some rows of one tensor are in memory at a time."""
        import onnx_ir as ir

        from calque.targets._tensorrt_expand import expand
        from calque.targets._tensorrt_table import PREFIX_ATTENTION

        own = any(node.op_type == PREFIX_ATTENTION for node in lowered.graph)
        with one_thread():
            ir.save(lowered, folder / (OWN if own else FILE), external_data=DATA)
            if own:
                written = ir.load(folder / OWN)  # its weights stay in the file that both share
                expand(written)
                ir.save(written, folder / FILE)
        return Emitted({"model": GraphSpec(FILE, model.inputs, model.outputs)}, model.limits)

    def layouts(self, precision: str) -> tuple[str, ...]:
        """Return flat alone."""
        return ("flat",)

    def finish(self, artifact: Artifact, config: PreTrainedConfig) -> tuple[Artifact, list[str]]:
        """Return the artifact with the files that build, run and check an engine beside it."""
        import onnx_ir as ir

        from calque.targets._tensorrt_package import write_package
        from calque.targets._tensorrt_profiles import profiles
        from calque.targets._tensorrt_table import PREFIX_ATTENTION

        own = artifact.folder / OWN
        build: dict[str, Any] = {
            "schema": 1,
            "onnx": OWN if own.is_file() else FILE,
            "engine": ENGINE,
            "network_flags": ["STRONGLY_TYPED"],
            "builder_flags": [],
            "memory_pool_limits": {},
            "builder_optimization_level": 3,
            "profiling_verbosity": "DETAILED",
            "hardware_compatibility_level": "NONE",
            "compute_capabilities": [],
        }
        if own.is_file():
            build["attention_lengths"] = sum(node.op_type == PREFIX_ATTENTION for node in ir.load(own).graph)
        if artifact.precision in QUANTIZED:
            build["arithmetic"] = "float16"  # which limits the answers are held to
        if artifact.precision == "fp32":
            build["cleared_builder_flags"] = ["TF32"]  # which the builder allows by itself: 10 bits of a product's 23
        write_package(artifact.folder, build, profiles(artifact, self.profiles))
        return artifact, self._without_effect(own.is_file(), bool(artifact.states))

    def _without_effect(self, own: bool, generates: bool) -> list[str]:
        """Return a sentence for each option that changes nothing of this model."""
        said = []
        if self.attention == "trt" and not own:
            said.append(
                "attention: trt changes nothing here: no attention has a mask that is a causal prefix of slots, and heads and a type that "
                "TensorRT has a kernel for."
            )
        if self.profiles == "two" and not generates:
            said.append("profiles: two changes nothing here: a model without a cache has no single steps.")
        return said

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of ONNX Runtime on this machine's CPU over model.onnx.

        Raises:
            TargetUnavailable: ONNX Runtime's CPU has no kernels for the artifact's precision.
        """
        from calque.runtime.standard_session import StandardSession
        from calque.targets._kernels import without_bfloat16

        if artifact.precision == "bf16" and (missing := without_bfloat16(artifact.folder / FILE)):
            raise TargetUnavailable(
                f"ONNX Runtime's CPU has no bfloat16 kernel of {', '.join(missing)}", fix="run_engine.py proves the engine on a GPU"
            )
        return StandardSession(artifact, threads)

    def exact(self, artifact: Artifact, threads: int = 0) -> Session | None:
        """Return a session over the artifact that rounds no activations; None where it rounds none itself."""
        from calque.targets._exact import ExactSession

        return ExactSession(artifact, threads) if rounds_activations(artifact) else None

    def blocks(self, artifact: Artifact, threads: int, nbytes: int, exact: bool = False) -> Session:
        """Return a session that holds about ``nbytes`` of weights at a time; ``exact``: it rounds no activations."""
        from calque.targets._blocks import BlockSession

        return BlockSession(artifact, threads, nbytes, exact or not rounds_activations(artifact))

    def builder_bytes(self, weights: int) -> int:
        """Return about how much memory the builder takes of so many bytes of weights."""
        from calque.targets import _tensorrt_build

        return _tensorrt_build.builder_bytes(weights)

    def build(self, artifact: Artifact, load: Callable[[], TracedModel], room: int | None) -> Built:
        """Return what building an engine here came to, and running it where there is a GPU."""
        from calque.targets import _tensorrt_build

        if self.via == "torch-tensorrt":
            return _tensorrt_build.build_traced(artifact, load)
        return _tensorrt_build.build(artifact, self.sdk, room)

    def integers(self, artifact: Artifact) -> dict[str, tuple[NDArray[np.int8], NDArray[np.generic]]]:
        """Return q int8 [out, in] and scale [out, groups] of every matrix of integers, by the name of its weight."""
        from calque.targets._onnx_integers import integers

        return integers(artifact.folder / artifact.graphs["model"].file)

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return the packages that emitting, proving and building take."""
        needs = {"onnxruntime": "to prove", "torch": "to convert", "onnx-ir": "to convert", "onnxscript": "to convert"}
        builders = {"tensorrt": "builds and runs engines on a GPU", "tensorrt-rtx": "builds engines without one"}
        return [*package_rows(needs), *optional_rows(builders)]


def _quantize(precision: str) -> tuple[Pass, ...]:
    """Return the passes that make codes of numbers: symmetric ones, as TensorRT takes no others."""
    from calque.passes.quantize_activations import QuantizeActivations
    from calque.passes.quantize_weights import QuantizeWeights

    weights = QuantizeWeights(**QUANTIZED[precision], stored="symmetric")
    if precision == "int8-static":
        return QuantizeActivations("static", symmetric=True), weights
    if precision == "fp8":
        return QuantizeActivations("auto", format="e4m3"), weights  # rounded where there is a text to measure their ranges on
    return (weights,)


TARGET = TensorRT
