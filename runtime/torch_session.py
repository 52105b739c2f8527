"""An artifact whose runtime is torch's: tensors in by position, tensors out by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calque.artifact import Artifact
from calque.errors import ArtifactUnreadable, TargetUnavailable
from calque.runtime.artifact_session import REDO, ArtifactSession
from calque.tensors import to_array, to_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Run = Callable[[list[Tensor]], Sequence[Tensor]]


class TorchSession(ArtifactSession):
    """Loads each of the artifact's graphs at its first call, by ``load``, which each runtime has its own of."""

    # How errors call the runtime.
    runtime = "torch"

    def __init__(self, artifact: Artifact, threads: int = 0) -> None:
        super().__init__(artifact, threads)
        self._open: dict[str, Run] = {}

    def load(self, path: Path, graph: str) -> Run:
        """Return what runs a graph of the file at ``path``; what it raises is told as a file that cannot be read."""
        raise NotImplementedError

    def run(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Return every output of ``graph`` by name, its inputs unchecked.

        Raises:
            UsageError: no such graph.
            ArtifactUnreadable: the runtime refuses the model, or fails while running it.
            TargetUnavailable: torch is not installed.
        """
        spec = self.spec(graph)
        run = self.opened(graph)
        import torch

        with self._explained(f"failed while running {spec.file}"), _on(self.threads), torch.inference_mode():
            values = run([to_tensor(inputs[tensor.name]) for tensor in spec.inputs])
            if len(values) != len(spec.outputs):
                raise ValueError(f"it gives {len(values)} outputs, the manifest names {len(spec.outputs)}")
            return {tensor.name: to_array(value) for tensor, value in zip(spec.outputs, values, strict=True)}

    def opened(self, graph: str) -> Run:
        """Return what runs ``graph``, the same each time.

        Raises:
            UsageError: no such graph.
            ArtifactUnreadable: the runtime refuses the file.
            TargetUnavailable: torch is not installed.
        """
        if graph not in self._open:
            path = self.artifact.folder / self.spec(graph).file
            if not path.exists():
                raise ArtifactUnreadable(f"{path} is missing, though the manifest names it", fix=REDO)
            try:
                import torch  # noqa: F401  # what `load` does needs it
            except ImportError as error:
                raise TargetUnavailable(f"torch cannot be imported: {error}", fix="pip install torch") from error
            with self._explained(f"refuses {path}"), _on(self.threads):
                self._open[graph] = self.load(path, graph)
        return self._open[graph]

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Give what fails in the runtime as ArtifactUnreadable."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, IndexError, OSError, KeyError, AssertionError) as error:
            raise ArtifactUnreadable(f"{self.runtime} {what}: {_first_lines(error)}", fix=REDO) from error


def _first_lines(error: Exception) -> str:
    """Return what an error says, without the stack of the runtime that follows it."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("frame #", "Exception raised from"))]
    return " ".join(kept[:6])


@contextmanager
def _on(threads: int) -> Iterator[None]:
    """Let torch use so many threads meanwhile; 0: as many as it does."""
    import torch

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads:
            torch.set_num_threads(before)
