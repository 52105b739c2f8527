"""A package compiled by Core ML, and run by it, on a Mac. Not run: no Mac was at hand when this was written."""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from calque.artifact import Artifact, Check
from calque.runtime.coreml_session import CORE_ML
from calque.targets import Built
from calque.targets._coreml_package import PACKAGE, quiet


def build(artifact: Artifact) -> Built:
    """Return whether Core ML compiles the package. That it runs it right, ``proof.numerics`` says: here the session is Core ML's."""
    with quiet():
        from coremltools.models.utils import compile_model
    begun, system = time.monotonic(), f"macOS {platform.mac_ver()[0]}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            compile_model(str(artifact.folder / PACKAGE), str(Path(folder) / "model.mlmodelc"))
        except Exception as error:  # Core ML's errors share no class but this
            why = " ".join(str(error).split())
            return Built(Check("failed", CORE_ML, why), Check("not_run", CORE_ML, "it does not compile"), (f"build: {why}",))
    found: dict[str, Any] = {"sdk": CORE_ML, "system": system, "build_seconds": time.monotonic() - begun}
    passed = Check("passed", CORE_ML)
    return Built(passed, Check("passed", CORE_ML, worst=artifact.proof.numerics.worst), (), found, (f"Compiled by Core ML of {system}.",))
