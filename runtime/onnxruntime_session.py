"""An artifact's ONNX graphs run on the CPU by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import Artifact, GraphSpec
from calque.errors import ArtifactUnreadable, TargetUnavailable
from calque.runtime.artifact_session import REDO, ArtifactSession

if TYPE_CHECKING:
    from numpy.typing import NDArray


class OnnxRuntimeSession(ArtifactSession):
    """Opens each of the artifact's graphs at its first call."""

    def __init__(self, artifact: Artifact, threads: int = 0) -> None:
        super().__init__(artifact, threads)
        self._open: dict[str, Any] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Return every output of ``graph`` by name, its inputs unchecked. Neither they nor the outputs are copied.

        Raises:
            UsageError: no such graph.
            ArtifactUnreadable: ONNX Runtime refuses the model, or fails while running it.
            TargetUnavailable: onnxruntime is not installed.
        """
        names = [output.name for output in self.spec(graph).outputs]
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
            self._open[graph] = self._load(self.spec(graph))
        return self._open[graph]

    @contextmanager
    def explained(self, graph: str) -> Iterator[None]:
        """Give what fails in ONNX Runtime while it runs ``graph`` as ArtifactUnreadable."""
        try:
            yield
        except Exception as error:  # onnxruntime's exceptions share no class but this
            file = self.spec(graph).file
            raise ArtifactUnreadable(f"onnxruntime failed while running {file}: {_text(error)}", fix=REDO) from error

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
            raise ArtifactUnreadable(f"{path} is missing, though the manifest names it", fix=REDO)
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
            raise ArtifactUnreadable(f"onnxruntime refuses {path}: {_text(error)}", fix=REDO) from error
        _check_names(spec, session)
        return session


def _text(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_names(spec: GraphSpec, session: Any) -> None:
    """Leave quietly if the file's inputs and outputs are those of the manifest."""
    told = {"input": {t.name for t in spec.inputs}, "output": {t.name for t in spec.outputs}}
    found = {"input": {t.name for t in session.get_inputs()}, "output": {t.name for t in session.get_outputs()}}
    lines = [f"{kind} {name}  in the manifest, not in the graph" for kind in told for name in sorted(told[kind] - found[kind])]
    lines += [f"input {name}  in the graph, not in the manifest" for name in sorted(found["input"] - told["input"])]
    if lines:
        raise ArtifactUnreadable(f"{spec.file} is not the graph that the manifest describes", lines, REDO)
