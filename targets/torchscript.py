"""TorchScript: one file that torch loads on a CPU without Python code of the model, in Python and in C++.

::

    model.pt          the graph as TorchScript, frozen: its weights are constants, tied ones once
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from calque.artifact import Artifact, GraphSpec
from calque.choices import NARROW, QUANTIZED
from calque.errors import UsageError
from calque.passes import Pass
from calque.targets import Emitted, Problem
from calque.targets._torchscript_target import WritesTorchScript

if TYPE_CHECKING:
    from calque.session import Session
    from calque.targets._torchscript import Writer
    from calque.traced import TracedModel

FILE = "model.pt"


@dataclass(frozen=True)
class TorchScript(WritesTorchScript):
    """``activations``: what int8 multiplies: values rounded to 8 bits, all of a call alike (``dynamic``), or float32 as they are."""

    activations: Literal["dynamic", "float32"] = "dynamic"

    name: ClassVar[str] = "torchscript"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8")

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes of this target, in order.

        Raises:
            UsageError: an option that the precision does not go with.
        """
        from calque.targets._torchscript_passes import listed

        if self.activations == "float32" and precision != "int8":
            raise UsageError(f"activations: float32 does not go with precision: {precision}", fix="leave one of the two out")
        return listed(QUANTIZED.get(precision), NARROW.get(precision), self.activations)

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return the nodes that have no line of TorchScript."""
        from calque.targets import _torchscript_check
        from calque.targets._aten import lengths_of_values

        return lengths_of_values(model) or _torchscript_check.problems(self.lower(model))

    def emit(self, lowered: Writer, model: TracedModel, folder: Path) -> Emitted:
        """Write model.pt; all weights are in memory."""
        from calque.targets._torchscript_file import save

        save(lowered, model, folder / FILE)
        return Emitted({"model": GraphSpec(FILE, model.inputs, model.outputs)}, model.limits)

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session of torch on this machine's CPU."""
        from calque.runtime.torchscript_session import TorchScriptSession

        return TorchScriptSession(artifact, threads)


TARGET = TorchScript
