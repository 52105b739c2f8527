"""What every session of an artifact does alike: calls are held against its manifest before its runtime sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from calque.artifact import Artifact, GraphSpec
from calque.errors import UsageError
from calque.runtime.limits import check_limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.generic]]

REDO = "convert the model again; `calque validate FOLDER` says which files are damaged"


class ArtifactSession:
    """Runs the artifact's graphs on ``threads`` threads, 0 leaving their number to the runtime; inputs and limits are checked before."""

    def __init__(self, artifact: Artifact, threads: int = 0) -> None:
        self.artifact = artifact
        self.threads = threads

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return every output of ``graph`` by name.

        Raises:
            UsageError: no such graph; an input is missing, unexpected, or of the wrong dtype or shape.
            Unsupported: the inputs go past a limit that the manifest records.
            ArtifactUnreadable: the runtime refuses the model, or fails while running it.
            TargetUnavailable: the runtime is not installed, or has no kernel for the model's precision.
        """
        self.check(graph, inputs)
        return self.run(graph, inputs)

    def check(self, graph: str, inputs: Arrays) -> None:
        """Leave quietly if ``graph`` can be given these inputs.

        Raises:
            UsageError: no such graph; an input is missing, unexpected, or of the wrong dtype or shape.
            Unsupported: the inputs go past a limit that the manifest records.
        """
        check_inputs(self.spec(graph), inputs)
        check_limits(self.artifact.limits, inputs)

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return every output of ``graph`` by name, its inputs unchecked.

        Raises:
            UsageError: no such graph.
            ArtifactUnreadable: the runtime refuses the model, or fails while running it.
            TargetUnavailable: the runtime is not installed.
        """
        raise NotImplementedError

    def spec(self, graph: str) -> GraphSpec:
        """Return what the manifest says of a graph.

        Raises:
            UsageError: no such graph.
        """
        spec = self.artifact.graphs.get(graph)
        if spec is None:
            raise UsageError(f"the artifact has no graph {graph!r}", fix=f"it has {', '.join(self.artifact.graphs)}")
        return spec


def _no_tokens(ids: NDArray[np.generic] | None) -> list[str]:
    """Return the line of ids that are none: some kernels divide by how many there are."""
    if ids is None or not ids.ndim or ids.size:
        return []
    return [f"input_ids  shape {list(ids.shape)}, at least one token expected"]


def check_inputs(spec: GraphSpec, inputs: Mapping[str, NDArray[np.generic]]) -> None:
    """Leave quietly if the inputs have the graph's names, dtypes and shapes, equal names of dimensions being equal sizes.

    Raises:
        UsageError: every input that has not.
    """
    expected = {tensor.name: tensor for tensor in spec.inputs}
    lines = [f"{name}  missing" for name in expected if name not in inputs]
    lines += [f"{name}  unexpected" for name in inputs if name not in expected]
    dims: dict[str, tuple[int, str]] = {}
    for name, tensor in expected.items():
        if name not in inputs:
            continue
        array = inputs[name]
        if array.dtype.name != tensor.dtype:
            lines.append(f"{name}  dtype {array.dtype.name}, {tensor.dtype} expected")
        if array.ndim != len(tensor.shape):
            lines.append(f"{name}  shape {list(array.shape)}, {list(tensor.shape)} expected")
            continue
        for size, wanted in zip(array.shape, tensor.shape, strict=True):
            known, by = (wanted, "the graph") if isinstance(wanted, int) else dims.setdefault(wanted, (size, name))
            if size != known:
                lines.append(f"{name}  shape {list(array.shape)}, {list(tensor.shape)} expected, {wanted} being {known} by {by}")
    parts = [dims.get(dim) for dim in ("past_sequence_length", "sequence_length", "total_sequence_length")]
    lines += _no_tokens(inputs.get("input_ids"))
    if not lines and all(parts):
        past, new, total = (part[0] for part in parts if part)
        if past + new != total:
            lines.append(f"{parts[2][1] if parts[2] else ''}  {total} columns, past {past} + new {new} expected")
    if lines:
        raise UsageError(f"the inputs do not fit {spec.file}", lines, "`calque inspect FOLDER` lists names, dtypes and shapes")
