"""An artifact's ONNX graphs run on the CPU by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import Artifact, GraphSpec
from calque.errors import ArtifactUnreadable, TargetUnavailable, UsageError
from calque.runtime.limits import check_limits

if TYPE_CHECKING:
    from numpy.typing import NDArray


class OnnxRuntimeSession:
    """Runs the artifact's graphs, each opened at its first call; inputs and limits are checked before it runs."""

    def __init__(self, artifact: Artifact, threads: int = 0) -> None:
        self.artifact = artifact
        self.threads = threads
        self._open: dict[str, Any] = {}

    def __call__(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Return every output of ``graph`` by name.

        Raises:
            UsageError: no such graph; an input is missing, unexpected, or of the wrong dtype or shape.
            Unsupported: the inputs go past a limit that the manifest records.
            ArtifactUnreadable: ONNX Runtime refuses the model, or fails while running it.
            TargetUnavailable: onnxruntime is not installed, or has no kernel for the model's precision.
        """
        spec = self._spec(graph)
        check_inputs(spec, inputs)
        check_limits(self.artifact.limits, inputs)
        return self.run(graph, inputs)

    def run(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Return every output of ``graph`` by name, its inputs unchecked. Neither they nor the outputs are copied.

        Raises:
            UsageError: no such graph.
            ArtifactUnreadable: ONNX Runtime refuses the model, or fails while running it.
            TargetUnavailable: onnxruntime is not installed.
        """
        names = [output.name for output in self._spec(graph).outputs]
        session = self.opened(graph)
        with self.explained(graph):
            arrays = session.run(names, {name: np.ascontiguousarray(array) for name, array in inputs.items()})
        return dict(zip(names, arrays, strict=True))

    def opened(self, graph: str) -> Any:
        """Return ONNX Runtime's own session of ``graph``, the same each time.

        Raises:
            UsageError: no such graph.
            ArtifactUnreadable: ONNX Runtime refuses the model.
            TargetUnavailable: onnxruntime is not installed.
        """
        if graph not in self._open:
            self._open[graph] = self._load(self._spec(graph))
        return self._open[graph]

    @contextmanager
    def explained(self, graph: str) -> Iterator[None]:
        """Give what fails in ONNX Runtime while it runs ``graph`` as ArtifactUnreadable."""
        try:
            yield
        except Exception as error:  # onnxruntime's exceptions share no class but this
            file = self._spec(graph).file
            raise ArtifactUnreadable(f"onnxruntime failed while running {file}: {_text(error)}", fix=_REDO) from error

    def _spec(self, graph: str) -> GraphSpec:
        spec = self.artifact.graphs.get(graph)
        if spec is None:
            raise UsageError(f"the artifact has no graph {graph!r}", fix=f"it has {', '.join(self.artifact.graphs)}")
        return spec

    def model(self, path: Path) -> str | bytes:
        """Return what ONNX Runtime opens: the file, or its bytes changed."""
        return os.fspath(path)

    def configure(self, options: Any) -> None:
        """Leave the session options of ONNX Runtime as they are wanted beyond threads and files: as they come."""

    def _load(self, spec: GraphSpec) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise TargetUnavailable(f"onnxruntime cannot be imported: {error}", fix="pip install onnxruntime") from error
        path = self.artifact.folder / spec.file
        if not path.is_file():
            raise ArtifactUnreadable(f"{path} is missing, though the manifest names it", fix=_REDO)
        options = onnxruntime.SessionOptions()
        # What it says goes to stderr past Python's logging; what matters comes back as an exception.
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads
        # Where weights lie beside a graph that is given as bytes.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(path.parent))
        self.configure(options)
        try:
            session = onnxruntime.InferenceSession(self.model(path), options, providers=["CPUExecutionProvider"])
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            fix = "run it where ONNX Runtime has such kernels, as on CUDA"
            raise TargetUnavailable(f"ONNX Runtime's CPU lacks a kernel that {path} needs: {_text(error)}", fix=fix) from error
        except Exception as error:  # onnxruntime's exceptions share no class but this
            raise ArtifactUnreadable(f"onnxruntime refuses {path}: {_text(error)}", fix=_REDO) from error
        _check_names(spec, session)
        return session


_REDO = "convert the model again; `calque validate FOLDER` says which files are damaged"


def _text(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_names(spec: GraphSpec, session: Any) -> None:
    """Leave quietly if the file's inputs and outputs are those of the manifest."""
    told = {"input": {t.name for t in spec.inputs}, "output": {t.name for t in spec.outputs}}
    found = {"input": {t.name for t in session.get_inputs()}, "output": {t.name for t in session.get_outputs()}}
    lines = [f"{kind} {name}  in the manifest, not in the graph" for kind in told for name in sorted(told[kind] - found[kind])]
    lines += [f"input {name}  in the graph, not in the manifest" for name in sorted(found["input"] - told["input"])]
    if lines:
        raise ArtifactUnreadable(f"{spec.file} is not the graph that the manifest describes", lines, _REDO)


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
