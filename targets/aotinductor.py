"""AOTInductor: the model compiled to machine code, in a package that Python and C++ load; its weights lie beside it.

::

    model.pt2                   every call: graphs: one
    prefill.pt2, decode.pt2     graphs: split, of which decode takes calls of one new token of each row
    model.safetensors           the weights, mapped once and read by all packages

The code is for any processor of x86-64-v3 (AVX2), unless ``march: native``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Literal

from calque.artifact import Artifact, GraphSpec, rounds_activations
from calque.choices import NARROW, QUANTIZED
from calque.passes import Pass
from calque.targets import Emitted, Problem, package_rows

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from calque.session import Session
    from calque.traced import TracedModel

FILE = "model.pt2"


@dataclass(frozen=True)
class Lowered:
    """The program that is compiled, and the model whose weights it reads."""

    program: ExportedProgram
    model: TracedModel


@dataclass(frozen=True)
class AOTInductor:
    """``march``: code for any processor of the machine's baseline, or for this one alone.

    ``activations``: what int8 and int4 multiply: values rounded to 8 bits, block by block, or float32 as they are.
    """

    march: Literal["portable", "native"] = "portable"
    activations: Literal["int8", "float32"] = "int8"

    name: ClassVar[str] = "aotinductor"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8", "int4")

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order."""
        from calque.passes.cache_dynamic import CacheDynamic
        from calque.passes.cast_precision import CastPrecision
        from calque.passes.drop_zero_bias import DropZeroBias
        from calque.passes.pack_panels import PackPanels
        from calque.passes.quantize_weights import QuantizeWeights

        cast = (CastPrecision(NARROW[precision]),) if precision in NARROW else ()
        if precision in QUANTIZED:
            return (QuantizeWeights(**QUANTIZED[precision]), DropZeroBias(), CacheDynamic(), PackPanels())
        return (DropZeroBias(), CacheDynamic(), *cast)

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return nothing: what Inductor cannot compile it says while it does."""
        return []

    def lower(self, model: TracedModel) -> Lowered:
        """Return the program in ATen; its weights are still where the checkpoint has them."""
        import torch

        from calque.targets import _aotinductor_products, _aten

        told = _aotinductor_products.switched(model, self.activations == "int8")
        meanings = {torch.ops.calque.attention.default: _aten.dot_product_attention}
        return Lowered(_aten.to_aten(told, meanings, (_aotinductor_products.PANEL_LINEAR,)), told)

    def emit(self, lowered: Lowered, model: TracedModel, folder: Path) -> Emitted:
        """Write the weights, some rows at a time, and compile the package."""
        from calque.runtime.aotinductor_session import WEIGHTS
        from calque.targets import _aotinductor_compile, _aotinductor_products, _aotinductor_weights

        kept = _aotinductor_weights.unite(lowered.program, lowered.model)
        _aotinductor_weights.write(folder / WEIGHTS, lowered.model, kept)
        compiler = _aotinductor_compile.Compiler(self.march, shims=_aotinductor_products.shims())
        with TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            _aotinductor_compile.compile_package(lowered.program, folder / FILE, Path(scratch), compiler)
        return Emitted({"model": GraphSpec(FILE, model.inputs, model.outputs)}, model.limits)

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session over the packages on this machine."""
        from calque.runtime.aotinductor_session import AOTInductorSession

        return AOTInductorSession(artifact, threads)

    def exact(self, artifact: Artifact, threads: int = 0) -> Session | None:
        """Return a session over the artifact that rounds no activations; None where it rounds none itself."""
        from calque.runtime.aotinductor_session import AOTInductorSession

        return AOTInductorSession(artifact, threads, exact=True) if rounds_activations(artifact) else None

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return what compiling and running takes."""
        return package_rows({"torch": "to convert and to run"})


TARGET = AOTInductor
