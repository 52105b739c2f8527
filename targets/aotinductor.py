"""AOTInductor: the model compiled to machine code, in a package that Python and C++ load; its weights lie beside it.

::

    model.pt2                   every call: graphs: one
    prefill.pt2, decode.pt2     graphs: split, of which decode takes calls of one new token of each row
    model.safetensors           the weights, mapped once and read by all packages

The code is for any processor of x86-64-v3 (AVX2), unless ``march: native``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Literal

from calque.artifact import DECODE, PREFILL, SHARED_WEIGHTS, Artifact, GraphSpec, rounds_activations
from calque.choices import NARROW, QUANTIZED, Requirement
from calque.errors import TargetUnavailable, UsageError
from calque.passes import Pass
from calque.runtime.aotinductor_session import MODEL
from calque.targets import Emitted, Problem, package_rows, without_cache
from calque.tensors import to_array

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.export import ExportedProgram

    from calque.session import Session
    from calque.traced import TracedModel


@dataclass(frozen=True)
class Lowered:
    """The programs that are compiled, each with what the manifest says of it; the model and the names of the weights they read."""

    model: TracedModel
    weights: Mapping[str, Tensor]
    graphs: Mapping[str, tuple[ExportedProgram, GraphSpec]]


@dataclass(frozen=True)
class AOTInductor:
    """``march``: code for any processor of the machine's baseline, or for this one alone.

    ``graphs``: one package for every call, or ``split``: one for prompts and one for steps, over the same weights.
    ``device``: ``cuda`` compiles for the GPU of this machine, in fp32 or bf16, with keys and values in slots and steps as CUDA graphs.
    ``activations``: what int8 and int4 multiply: values rounded to 8 bits, block by block, or float32 as they are.
    """

    march: Literal["portable", "native"] = "portable"
    activations: Literal["int8", "float32"] = "int8"
    graphs: Literal["one", "split"] = "one"
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.device == "cuda" and self.march != "portable":
            raise ValueError("march: native belongs to device: cpu; code for a GPU is that of the GPU here")

    name: ClassVar[str] = "aotinductor"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8", "int4")

    def require(self, needed: Requirement | None) -> None:
        """Leave quietly if a C++ compiler is here, and a GPU if one is asked for; what was compiled runs where it was.

        Raises:
            TargetUnavailable: there is none.
        """
        from calque.targets import _aotinductor_compile

        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                found = [f"torch {torch.__version__}"]
                raise TargetUnavailable("device: cuda compiles on an NVIDIA GPU, and torch finds none", found, "leave device: cuda out")
        _aotinductor_compile.find_compiler()

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order."""
        from calque.passes.cache_dynamic import CacheDynamic
        from calque.passes.cache_static import CacheStatic
        from calque.passes.cast_precision import CastPrecision
        from calque.passes.drop_zero_bias import DropZeroBias
        from calque.passes.pack_panels import PackPanels
        from calque.passes.quantize_weights import QuantizeWeights

        cast = (CastPrecision(NARROW[precision]),) if precision in NARROW else ()
        if self.device == "cuda":
            if precision in QUANTIZED:
                why = f"device: cuda has no {precision}: the kernels that multiply integers are a CPU's"
                raise UsageError(why, fix="take fp32 or bf16, or the target tensorrt")
            return (DropZeroBias(), CacheStatic(), *cast)  # slots: every step has the same shapes
        if precision in QUANTIZED:
            return (QuantizeWeights(**QUANTIZED[precision]), DropZeroBias(), CacheDynamic(), PackPanels())
        return (DropZeroBias(), CacheDynamic(), *cast)

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return lengths that values decide, and an option without effect; what else Inductor cannot compile it says while it does."""
        from calque.targets._aten import lengths_of_values

        return [*lengths_of_values(model), *without_cache(model, ("graphs: split",) if self.graphs == "split" else ())]

    def lower(self, model: TracedModel) -> Lowered:
        """Return the program in ATen; its weights are still where the checkpoint has them."""
        import torch

        from calque.targets import _aotinductor_graphs, _aotinductor_products, _aotinductor_weights, _aten

        told = _aotinductor_products.switched(model, self.activations == "int8")
        meanings = {torch.ops.calque.attention.default: _aten.dot_product_attention}
        program = _aten.to_aten(told, meanings, (_aotinductor_products.PANEL_LINEAR,))
        if self.device == "cuda":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, "cuda")
        weights = _aotinductor_weights.unite(program, told)
        whole = GraphSpec(f"{MODEL}.pt2", model.inputs, model.outputs)
        if self.graphs == "one" or not model.states:
            return Lowered(told, weights, {MODEL: (program, whole)})
        inputs, outputs = (_aotinductor_graphs.step_specs(specs) for specs in (model.inputs, model.outputs))
        step = _aotinductor_graphs.stepped(program, model.inputs)
        return Lowered(
            told,
            weights,
            {PREFILL: (program, replace(whole, file=f"{PREFILL}.pt2")), DECODE: (step, GraphSpec(f"{DECODE}.pt2", inputs, outputs))},
        )

    def emit(self, lowered: Lowered, model: TracedModel, folder: Path) -> Emitted:
        """Write the weights, some rows at a time, and compile the packages."""
        from calque.targets import _aotinductor_compile, _aotinductor_graphs, _aotinductor_products, _aotinductor_weights

        for program, spec in lowered.graphs.values():
            _aotinductor_graphs.require_dynamic(program, spec.inputs, spec.file)
        _aotinductor_weights.write(folder / SHARED_WEIGHTS, lowered.model, lowered.weights)
        compiler = _aotinductor_compile.Compiler(self.march, shims=_aotinductor_products.shims())
        with TemporaryDirectory(dir=folder, prefix=".scratch-") as scratch:
            for program, spec in lowered.graphs.values():
                _aotinductor_compile.compile_package(program, folder / spec.file, Path(scratch), compiler)
                _aotinductor_compile.require_bare(folder / spec.file, program, folder / SHARED_WEIGHTS)
        return Emitted({name: spec for name, (_, spec) in lowered.graphs.items()}, model.limits)

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session over the packages on this machine."""
        from calque.runtime.aotinductor_session import AOTInductorSession

        return AOTInductorSession(artifact, threads)

    def exact(self, artifact: Artifact, threads: int = 0) -> Session | None:
        """Return a session over the artifact that rounds no activations; None where it rounds none itself."""
        from calque.runtime.aotinductor_session import AOTInductorSession

        return AOTInductorSession(artifact, threads, exact=True) if rounds_activations(artifact) else None

    def integers(self, artifact: Artifact) -> dict[str, tuple[NDArray[np.int8], NDArray[np.generic]]]:
        """Return q int8 [out, in] and scale [out, groups] of every matrix of integers, by the name of its weight."""
        from calque.targets._aotinductor_weights import integers

        return {name: (to_array(q), to_array(scale)) for name, (q, scale) in integers(artifact.folder / SHARED_WEIGHTS).items()}

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return what compiling and running takes."""
        from calque.targets import _aotinductor_compile

        try:
            compiler, note = shlex.join(_aotinductor_compile.find_compiler()), "to convert"
        except TargetUnavailable as error:
            compiler, note = "missing", f"to convert: {error.fix}"
        return [*package_rows({"torch": "to convert and to run"}), ("C++ compiler", compiler, note)]


TARGET = AOTInductor
