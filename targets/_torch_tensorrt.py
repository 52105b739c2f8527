"""torch-tensorrt: an engine of the traced and rewritten program itself, with no ONNX file between; on a machine with a GPU.

::

    before  %all = calque.write_slots(%past, %new, write_indices)     every other calque operator as the passes left it
    after   %all = calque.write_slots(%past, %new, write_indices)     ATen alone besides, parameters real
    engine  IKVCacheUpdateLayer(past, new, write_indices), its output the memory of its input

torch-tensorrt makes that layer of its own only of writes at a place that is a constant, of one row. Slots begin where each
row's tokens do, so that what writes them stays whole until the layer is made of it here. What is called here is checked against
the package's release; no engine of this route was run.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calque.errors import TargetUnavailable, Unsupported, UsageError
from calque.targets import _aten

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from calque.artifact import TensorSpec
    from calque.traced import TracedModel

# The first release that gives an engine's tensors the names it is told; it is built for the torch of the same number.
INSTALL = "on a machine with an NVIDIA GPU and its driver: pip install 'torch-tensorrt>=2.14', which brings torch 2.14 and TensorRT 11"


def require() -> None:
    """Leave quietly if torch-tensorrt is here, and a GPU for it.

    Raises:
        TargetUnavailable: what is missing, and the line that installs it.
    """
    if find_spec("torch_tensorrt") is None:
        raise TargetUnavailable("torch-tensorrt is not installed", fix=INSTALL)
    if not torch.cuda.is_available():
        raise TargetUnavailable("torch-tensorrt builds on an NVIDIA GPU, and torch finds none", [f"torch {torch.__version__}"], INSTALL)
    try:
        from torch_tensorrt.dynamo import convert_exported_program_to_serialized_trt_engine as convert
    except Exception as error:  # it raises the bare class where TensorRT's libraries are not found
        raise TargetUnavailable("torch-tensorrt cannot be loaded", [f"{type(error).__name__}: {error}"], INSTALL) from error
    if "output_binding_names" not in inspect.signature(convert).parameters:
        raise TargetUnavailable("this torch-tensorrt gives an engine's tensors names of its own", fix=INSTALL)


def build(model: TracedModel, engine: Path, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """``engine`` holds the engine of the graph, its tensors named as the artifact's; every weight is read.

    ``shapes``: of each input whose shape changes, the shapes ``min``, ``opt`` and ``max``.

    Raises:
        TargetUnavailable: torch-tensorrt, or a GPU for it, is not here.
        UsageError: an input whose shape changes has no range.
        Unsupported: the graph has an operator that torch-tensorrt does not know, or TensorRT refuses it.
    """
    require()
    import torch_tensorrt
    from torch_tensorrt.dynamo import convert_exported_program_to_serialized_trt_engine

    if missing := [spec.name for spec in model.inputs if spec.name not in shapes and any(isinstance(size, str) for size in spec.shape)]:
        raise UsageError("inputs of changing shape have no range", missing, "give each its min, opt and max")
    _register_slots()
    inputs = [torch_tensorrt.Input(dtype=getattr(torch, spec.dtype), **_ranges(spec, shapes)) for spec in model.inputs]
    program, said = decomposed(model), _Errors()
    try:
        with said:
            written = convert_exported_program_to_serialized_trt_engine(
                program,
                arg_inputs=inputs,
                arg_input_binding_names=tuple(spec.name for spec in model.inputs),
                output_binding_names=tuple(spec.name for spec in model.outputs),
                truncate_double=True,
                attn_bias_is_causal=False,  # else every mask of an attention is taken for a causal one
            )
    except RuntimeError as error:
        lines = [line for text in (*said.texts, str(error)) for line in text.splitlines()[:1] if line.strip()]
        raise Unsupported("torch-tensorrt builds no engine of this graph", lines, "build the ONNX file instead: via: onnx") from error
    engine.write_bytes(written)


class _Errors(logging.Handler):
    """Keeps the errors that torch-tensorrt logs while it is open: why TensorRT refuses a network stands nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """``texts`` has what is said, if torch-tensorrt says it."""
        if record.name.startswith("torch_tensorrt"):
            self.texts.append(record.getMessage())

    def __enter__(self) -> None:
        # On the root: TensorRT's own messages go to a logger whose name has no dot.
        logging.getLogger().addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def decomposed(model: TracedModel) -> ExportedProgram:
    """Return the program in ATen, slots still written by ``calque::write_slots``; its parameters are the real ones.

    Its arguments and results are positional, in the order of ``model.inputs`` and ``outputs``.
    """
    whole = (torch.ops.calque.write_slots.default,)  # which becomes a layer
    return _aten.bind(_aten.to_aten(model, {torch.ops.aten.cumsum.default: _cumsum}, whole), model)


def _cumsum(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """Return sums of whole numbers by way of float32, exact to 2²⁴: torch-tensorrt 2.14 adds them to a float32 zero, and casts nothing."""
    if x.is_floating_point() or (dtype is not None and dtype.is_floating_point):
        return NotImplemented
    return x.to(torch.float32).cumsum(dim).to(dtype or torch.int64)


def _ranges(spec: TensorSpec, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, tuple[int, ...]]:
    """Return the arguments of ``torch_tensorrt.Input`` that say an input's shape."""
    if spec.name not in shapes:
        return {"shape": tuple(int(size) for size in spec.shape)}
    given = shapes[spec.name]
    return {"min_shape": tuple(given["min"]), "opt_shape": tuple(given["opt"]), "max_shape": tuple(given["max"])}


@cache
def _register_slots() -> None:
    """torch-tensorrt makes TensorRT's own layer, which writes in place, of ``calque::write_slots``."""
    from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
    from torch_tensorrt.dynamo.conversion.converter_utils import cast_trt_tensor
    from torch_tensorrt.dynamo.conversion.impl.slice_scatter import emit_kv_cache_update_layer

    def write_slots(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
        past, new, write_indices = args
        # Heads came apart by a size that is worked out, which the layer would take for one of any call.
        apart = ctx.net.add_shuffle(new)
        apart.reshape_dims = (0, past.shape[1], 0, past.shape[3])
        starts = cast_trt_tensor(ctx, write_indices, torch.int32, f"{name}_starts")
        whole = emit_kv_cache_update_layer(ctx, name, past, apart.get_output(0), starts)
        if whole is None:
            raise RuntimeError(f"{name}: TensorRT writes no slots of a state that is not an input as it stands")
        return whole

    dynamo_tensorrt_converter(torch.ops.calque.write_slots.default, supports_dynamic_shapes=True)(write_slots)
