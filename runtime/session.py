"""An artifact found and opened by the runtime that its target names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calque import plugins
from calque.artifact import Artifact
from calque.errors import TargetUnavailable
from calque.runtime.onnxruntime_session import OnnxRuntimeSession
from calque.runtime.standard_session import StandardSession
from calque.session import Session

# The targets whose artifacts ONNX Runtime runs, and how: TensorRT's are files of the standard, run here on the CPU.
SESSIONS: dict[str, type[OnnxRuntimeSession]] = {"onnxruntime": OnnxRuntimeSession, "tensorrt": StandardSession}


def load(folder: Path | str) -> Artifact:
    """Return the artifact in ``folder``; nothing is opened yet.

    Raises:
        ArtifactUnreadable: not an artifact, or one of a newer schema.
    """
    return Artifact.read(Path(folder))


def open_session(folder: Path | str, threads: int = 0) -> Session:
    """Return a session that runs the artifact in ``folder``; ``threads`` 0 leaves their number to the runtime.

    Raises:
        ArtifactUnreadable: not an artifact, or one of a newer schema.
        TargetUnavailable: no runtime for its target is built in, or plugged in.
    """
    artifact = load(folder)
    if artifact.target not in SESSIONS:
        if entry := plugins.claimed(plugins.TARGETS, artifact.target, built_in=False):
            return _opened(plugins.load(entry, _faults), artifact, threads)
        raise TargetUnavailable(
            f"an artifact for {artifact.target} cannot be run by Calque's own runtime",
            fix=f"load it with the SDK of {artifact.target}; built in: {', '.join(SESSIONS)}",
        )
    return SESSIONS[artifact.target](artifact, threads)


def _opened(target: Any, artifact: Artifact, threads: int) -> Session:
    session: Session = target(**artifact.recipe.get("options", {})).open(artifact, threads)
    return session


def _faults(found: Any, name: str) -> Iterator[str]:
    if not isinstance(found, type) or not callable(getattr(found, "open", None)):
        yield f"it is no target with a method open(artifact, threads) but {found!r}"
