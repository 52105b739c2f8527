"""TorchScript Lite: one file for the interpreter of PyTorch Mobile, on Android and iOS.

::

    model.ptl         bytecode and constants: the graph, its weights once, what a call looks like, and what its inputs are called
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from calque.artifact import Artifact, GraphSpec
from calque.choices import QUANTIZED
from calque.passes import Pass
from calque.targets import Emitted, Problem, package_rows

if TYPE_CHECKING:
    from calque.session import Session
    from calque.targets._torchscript import Writer
    from calque.traced import TracedModel

FILE = "model.ptl"


@dataclass(frozen=True)
class TorchScriptLite:
    """It has no options."""

    name: ClassVar[str] = "torchscript-lite"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order."""
        from calque.targets._torchscript_passes import listed

        return listed(QUANTIZED.get(precision), None, "dynamic")

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return the nodes that have no line of TorchScript, and those whose operator the runtime of phones has not."""
        return self.lower(model).problems

    def lower(self, model: TracedModel) -> Writer:
        """Return the lines of TorchScript; its weights are still where the checkpoint has them."""
        from calque.targets import _torchscript_passes

        return _torchscript_passes.lower(model)

    def emit(self, lowered: Writer, model: TracedModel, folder: Path) -> Emitted:
        """Write model.ptl; all weights are in memory."""
        from calque.targets._torchscript_file import save_lite

        save_lite(lowered, model, folder / FILE)
        return Emitted({"model": GraphSpec(FILE, model.inputs, model.outputs)}, model.limits)

    def emission_bytes(self, weights: int) -> int:
        """Return about how much memory writing takes of so many bytes of weights."""
        return 2 * weights

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of the lite interpreter on this machine's CPU."""
        from calque.runtime.torchscript_session import LiteSession

        return LiteSession(artifact, threads)

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return the packages that emitting and running take."""
        return package_rows({"torch": "to convert and to run"})


TARGET = TorchScriptLite
