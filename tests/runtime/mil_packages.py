"""Core ML packages for tests of the interpreter: built of operators by coremltools, saved, and run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from calque.runtime.mil import MilProgram

ct = pytest.importorskip("coremltools")

if TYPE_CHECKING:
    from numpy.typing import NDArray

Build = Callable[..., Any]

f16, f32 = partial(np.array, dtype=np.float16), partial(np.array, dtype=np.float32)
i8, i16, i32 = partial(np.array, dtype=np.int8), partial(np.array, dtype=np.int16), partial(np.array, dtype=np.int32)
u8, u32 = partial(np.array, dtype=np.uint8), partial(np.array, dtype=np.uint32)


# What coremltools 9.0 does that this Python, PyTorch and numpy warn of.
WARNED: tuple[tuple[str, type[Warning]], ...] = (
    ("Implicitly cleaning up", ResourceWarning),  # it leaves temporary folders of weights to the garbage collector
    ("Function _TORCH_OPS_REGISTRY.__contains__ is deprecated", DeprecationWarning),  # its own
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    ("overflow encountered in cast", RuntimeWarning),  # it makes the least float32 an infinite float16
)


@contextmanager
def unwarned() -> Iterator[None]:
    """Ignore what coremltools is warned of."""
    with warnings.catch_warnings():
        for message, category in WARNED:
            warnings.filterwarnings("ignore", message, category)
        yield


def convert(module: Any, given: tuple[Any, ...], path: Path, precision: str = "FLOAT32") -> Path:
    """Save a PyTorch module, exported, as coremltools converts it by its defaults; its output is ``y``."""
    import torch

    with torch.no_grad(), unwarned():
        exported = torch.export.export(module.eval(), given).run_decompositions({})
        ct.convert(
            exported,
            outputs=[ct.TensorType("y")],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=getattr(ct.precision, precision),
            skip_model_load=True,
            package_dir=str(path),
        )
    return path


def save(program: Any, path: Path, target: str = "iOS18") -> Path:
    """Save a program of MIL as it is, no pass run over it; return where."""
    with unwarned():
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(path),
        )
    return path


def package(path: Path, cases: Mapping[str, Build], *inputs: NDArray[Any], target: str = "iOS18") -> Path:
    """Save a package of inputs x, y and z with the outputs of each case, built by coremltools; truths come out as 0 and 1."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    specs = [mb.TensorSpec(shape=value.shape, dtype=types.numpy_type_to_builtin_type(value.dtype)) for value in inputs]

    def build(*values: Any) -> tuple[Any, ...]:
        found = []
        for name, case in cases.items():
            made = case(mb, *values)
            for place, one in enumerate(made if isinstance(made, list | tuple) else [made]):
                as_number = one if one.dtype in (types.fp32, types.fp16, types.int32) else mb.cast(x=one, dtype="int32")
                found.append(mb.identity(x=as_number, name=f"{name}_{place}"))
        return tuple(found)

    # The builder counts and names inputs by the parameters of what it is given.
    function = [lambda x: build(x), lambda x, y: build(x, y), lambda x, y, z: build(x, y, z)][len(inputs) - 1]
    return save(mb.program(input_specs=specs, opset_version=getattr(ct.target, target))(function), path, target)


def results(path: Path, *inputs: NDArray[Any]) -> dict[str, list[NDArray[Any]]]:
    """Return the results of each case of a package, in order."""
    found: dict[str, list[NDArray[Any]]] = {}
    for name, value in MilProgram(path)(dict(zip("xyz", inputs, strict=False))).items():
        found.setdefault(name.rpartition("_")[0], []).append(value)
    return found


def assert_close(found: NDArray[Any], expected: Any, tolerance: float = 1e-6) -> None:
    """Fail unless shapes are equal, and values within a tolerance of each and of one."""
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
