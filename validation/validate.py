"""An artifact checked again where it is: whole, and still giving the eager model's logits. No torch needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calque.artifact import Artifact
from calque.validation.compare import compare
from calque.validation.drive import ModelIO
from calque.validation.reference import read_references


def validate(folder: Path, threads: int = 0) -> dict[str, Any]:
    """Return ``{"status", "scenarios", "failures"}``: every stored scenario run again on the artifact in ``folder``.

    ``threads``: how many the runtime may use, 0 leaves it to the runtime.

    Raises:
        ArtifactUnreadable: not an artifact, a damaged one, or one without references.
        TargetUnavailable: the artifact's runtime is not here.
    """
    folder = Path(folder)
    artifact = Artifact.read(folder)
    artifact.require_whole()
    from calque.runtime import open_session

    session = open_session(folder, threads)
    io = ModelIO.of(artifact)
    rows = [compare(session, io, scenario, expected) for scenario, expected in read_references(folder)]
    failures = [f"{row['name']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    return {"status": "failed" if failures else "passed", "scenarios": rows, "failures": failures}
