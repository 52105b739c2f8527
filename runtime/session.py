"""An artifact found and opened by the runtime that its target names."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from calque import plugins
from calque.artifact import Artifact
from calque.errors import TargetUnavailable
from calque.session import Session

# What runs a target's artifacts, module and class: TensorRT's are files of the standard, run by ONNX Runtime on the CPU.
SESSIONS = {
    "onnxruntime": ("onnxruntime_session", "OnnxRuntimeSession"),
    "tensorrt": ("standard_session", "StandardSession"),
    "torchscript": ("torchscript_session", "TorchScriptSession"),
    "torchscript-lite": ("torchscript_session", "LiteSession"),
    "aotinductor": ("aotinductor_session", "AOTInductorSession"),
    "coreml": ("coreml_session", "CoreMLSession"),
}


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
    module, name = SESSIONS[artifact.target]
    session: Session = getattr(import_module(f"calque.runtime.{module}"), name)(artifact, threads)
    return session


def _opened(target: Any, artifact: Artifact, threads: int) -> Session:
    session: Session = target(**artifact.recipe.get("options", {})).open(artifact, threads)
    return session


def _faults(found: Any, name: str) -> Iterator[str]:
    if not isinstance(found, type) or not callable(getattr(found, "open", None)):
        yield f"it is no target with a method open(artifact, threads) but {found!r}"
