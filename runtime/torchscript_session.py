"""TorchScript artifacts run by torch: whole files by its interpreter, mobile ones by the interpreter of phones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.runtime.torch_session import TorchSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from calque.runtime.torch_session import Run

# What torch 2.13 says of TorchScript at every call: that there will be no more of it. It is what these artifacts are made of.
DEPRECATED = r".*(torch\.jit|TorchScript|Lite Interpreter).*"

# A product whose values are rounded to the range of each call, and the same product without that.
ROUNDED = """graph(%x, %packed, %reduce_range):
    %out = quantized::linear_dynamic(%x, %packed, %reduce_range)
    return (%out)"""
UNROUNDED = """graph(%x, %packed, %reduce_range):
    %integers : Tensor, %bias : Tensor? = quantized::linear_unpack(%packed)
    %weight = aten::dequantize(%integers)
    %out = aten::linear(%x, %weight, %bias)
    return (%out)"""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself that torch calls TorchScript deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=DEPRECATED, category=DeprecationWarning)
        yield


class TorchScriptSession(TorchSession):
    """Runs ``model.pt`` in torch's own interpreter."""

    runtime = "TorchScript"

    def load(self, path: Path, graph: str) -> Run:
        """Return what runs the module at ``path``."""
        import torch

        with quiet():
            run = _listed(torch.jit.load(str(path), map_location="cpu").eval())  # type: ignore[no-untyped-call]

        def unprofiled(given: list[Any]) -> Sequence[Any]:
            # Profiled, the first two calls of each graph take twice as long, and none after them is faster (docs/targets/torchscript.md).
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                return run(given)

        return unprofiled


class ExactSession(TorchScriptSession):
    """Runs a file as `TorchScriptSession` does, a mobile one too, but rounds nothing that is multiplied by integers."""

    def load(self, path: Path, graph: str) -> Run:
        """Return what runs the module at ``path`` with ``aten::linear`` in the place of each product of integers."""
        import torch

        with quiet():
            module: Any = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            torch._C._jit_pass_custom_pattern_based_rewrite_graph(ROUNDED, UNROUNDED, module.graph)
        # What runs is the graph that was changed, not code that was made of it before.
        run = _listed(torch._C._create_function_from_graph("exact", module.graph))
        return lambda given: run([module._c, *given])


class LiteSession(TorchSession):
    """Runs ``model.ptl`` in the lite interpreter, the one that is on phones."""

    runtime = "the lite interpreter"

    def load(self, path: Path, graph: str) -> Run:
        """Return what runs the module at ``path``."""
        from torch.jit.mobile import _load_for_lite_interpreter

        with quiet():
            return _listed(_load_for_lite_interpreter(str(path), map_location="cpu"))  # type: ignore[no-untyped-call]


def _listed(module: Callable[..., Any]) -> Run:
    """Return what calls a module whose one result is a tensor and no tuple."""

    def run(given: list[Any]) -> list[Any]:
        results = module(*given)
        return list(results) if isinstance(results, tuple) else [results]

    return run
