"""An artifact whose runtime is torch's: tensors in by position, tensors out by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calque.artifact import Artifact
from calque.errors import ArtifactUnreadable, TargetUnavailable, UsageError
from calque.runtime.artifact_session import REDO, ArtifactSession
from calque.tensors import to_array, to_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from calque.runtime.artifact_session import Arrays

    Run = Callable[[list[Tensor]], Sequence[Tensor]]


# What says in config.json how many rows the table has that an input chooses from.
TABLES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size"}


class TorchSession(ArtifactSession):
    """Loads each of the artifact's graphs at its first call, by ``load``, which each runtime has its own of."""

    # How errors call the runtime.
    runtime = "torch"

    def __init__(self, artifact: Artifact, threads: int = 0) -> None:
        super().__init__(artifact, threads)
        self._open: dict[str, Run] = {}
        self._tables: dict[str, int] | None = None

    def check(self, graph: str, inputs: Arrays) -> None:
        """Leave quietly if ``graph`` can be given these inputs.

        What is beyond a table ends the process of a package of AOTInductor, which sees it in a thread that cannot raise.

        Raises:
            UsageError: no such graph; an input is missing, unexpected, of the wrong dtype or shape, or beyond the model's table.
            Unsupported: the inputs go past a limit that the manifest records.
            ArtifactUnreadable: config.json, which says how large the tables are, is damaged.
        """
        super().check(graph, inputs)
        lines = [
            f"{name}  {least if least < 0 else most}, 0 to {rows - 1} expected"
            for name, rows in self._rows_of_tables().items()
            if (array := inputs.get(name)) is not None and array.size
            for least, most in [(int(array.min()), int(array.max()))]
            if least < 0 or most >= rows
        ]
        if lines:
            raise UsageError("the model has no such rows in its tables", lines, "feed what its tokenizer gives")

    def _rows_of_tables(self) -> dict[str, int]:
        """Return how many values each input chooses from, of those of which something says it."""
        if self._tables is None:
            config = self.artifact.config()
            known = {name: config.get(key) for name, key in TABLES.items()} | {"position_ids": self.artifact.limits.max_length}
            self._tables = {name: rows for name, rows in known.items() if isinstance(rows, int)}
        return self._tables

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
    """Return what an error says, without the stacks of the runtime around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    # TorchScript gives its own stack first, the lines of the file, and what went wrong last.
    last = [at for at, line in enumerate(lines) if line.startswith("RuntimeError: ")]
    lines = lines[last[-1] :] if last else lines
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
