"""What the targets that write TorchScript do alike; each has its file, its passes and its session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calque.artifact import Artifact, rounds_activations
from calque.targets import package_rows
from calque.tensors import to_array

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from calque.session import Session
    from calque.targets._torchscript import Writer
    from calque.traced import TracedModel


class WritesTorchScript:
    """A target whose file torch's interpreter loads, whatever runs it on its device."""

    def lower(self, model: TracedModel) -> Writer:
        """Return the lines of TorchScript; its weights are still where the checkpoint has them."""
        from calque.targets import _torchscript_passes

        return _torchscript_passes.lower(model)

    def emission_bytes(self, weights: int) -> int:
        """Return about how much memory writing takes of so many bytes of weights."""
        return 2 * weights

    def exact(self, artifact: Artifact, threads: int = 0) -> Session | None:
        """Return a session over the artifact that rounds no activations; None where it rounds none itself."""
        from calque.runtime.torchscript_session import ExactSession

        return ExactSession(artifact, threads) if rounds_activations(artifact) else None

    def integers(self, artifact: Artifact) -> dict[str, tuple[NDArray[np.int8], NDArray[np.generic]]]:
        """Return q int8 [out, in] and scale [out, groups] of every matrix of integers, by the name of its weight."""
        from calque.targets._torchscript_file import integers

        return {name: (to_array(q), to_array(scale)) for name, (q, scale) in integers(artifact).items()}

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return the packages that emitting and running take."""
        return package_rows({"torch": "to convert and to run"})
