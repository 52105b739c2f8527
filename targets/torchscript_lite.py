"""TorchScript Lite: one file for the interpreter of PyTorch Mobile, on Android and iOS.

::

    model.ptl         bytecode and constants: the graph, its weights once, what a call looks like, and what its inputs are called
    model.xnnpack.ptl with ``prepack``: the same with weights laid out for XNNPACK, which torch 2.13 can neither write nor load
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from calque.artifact import Artifact, GraphSpec
from calque.choices import QUANTIZED, Requirement
from calque.errors import TargetUnavailable, UsageError
from calque.passes import Pass
from calque.targets import Emitted, Problem
from calque.targets._torchscript_target import WritesTorchScript

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from calque.session import Session
    from calque.targets._torchscript import Writer
    from calque.traced import TracedModel

FILE, PREPACKED = "model.ptl", "model.xnnpack.ptl"


@dataclass(frozen=True)
class TorchScriptLite(WritesTorchScript):
    """``bytecode``: the version that the app's PyTorch Mobile reads; 8 is that of 1.13 to 2.1, and of this torch.

    ``prepack``: the Python of an environment whose torch has XNNPACK, 2.12 or older; it makes a second file, with weights laid out
    for that.
    """

    bytecode: Literal[5, 6, 7, 8] = 8
    prepack: str | None = None

    name: ClassVar[str] = "torchscript-lite"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")

    def require(self, needed: Requirement | None) -> None:
        """Leave quietly if the Python that ``prepack`` names is there.

        Raises:
            TargetUnavailable: it is not.
        """
        from calque.targets._torchscript_prepack import WAY_OUT

        if self.prepack and shutil.which(self.prepack) is None:
            raise TargetUnavailable(f"prepack: there is no program {self.prepack}", fix=WAY_OUT)

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order.

        Raises:
            UsageError: an option that the precision does not go with.
        """
        from calque.targets._torchscript_passes import listed

        if self.prepack and precision != "fp32":
            raise UsageError(
                f"prepack lays out float32 weights, and precision: {precision} has packed integers", fix="leave one of the two out"
            )
        return listed(QUANTIZED.get(precision), None, "dynamic")

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return the nodes that have no line of TorchScript, and those whose operator the runtime of phones has not."""
        from calque.targets import _torchscript_check
        from calque.targets._aten import lengths_of_values

        return lengths_of_values(model) or _torchscript_check.problems(self.lower(model), mobile=True)

    def emit(self, lowered: Writer, model: TracedModel, folder: Path) -> Emitted:
        """Write model.ptl; all weights are in memory."""
        from calque.targets._torchscript_file import save_lite

        save_lite(lowered, model, folder / FILE, self.bytecode)
        return Emitted({"model": GraphSpec(FILE, model.inputs, model.outputs)}, model.limits)

    def emission_bytes(self, weights: int) -> int:
        """Return about how much memory writing takes of so many bytes of weights: torch copies them, and reads the file that it wrote."""
        return 3 * weights

    def layouts(self, precision: str) -> tuple[str, ...]:
        """Return flat alone."""
        return ("flat",)

    def finish(self, artifact: Artifact, config: PreTrainedConfig) -> tuple[Artifact, list[str]]:
        """Return the artifact, with the file for XNNPACK beside its own where that is asked for, and what became of it.

        Raises:
            TargetUnavailable: the environment that is named cannot make it.
            BuildFailed: it computes something else.
        """
        from calque.targets._torchscript_prepack import prepack

        return artifact, [prepack(self.prepack, artifact.folder / FILE, artifact.folder / PREPACKED)] if self.prepack else []

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of the lite interpreter on this machine's CPU."""
        from calque.runtime.torchscript_session import LiteSession

        return LiteSession(artifact, threads)


TARGET = TorchScriptLite
