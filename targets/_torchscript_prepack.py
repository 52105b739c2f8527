"""A file for phones with its weights laid out for XNNPACK, made and run in another environment, whose torch still has it.

What is proved of it: the file that it is made of agrees with the eager model by the gate here, and it agrees with that file there, in
the lite interpreter of the release that made it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from calque.console import size
from calque.errors import BuildFailed, TargetUnavailable

SCRIPT = Path(__file__).with_name("torchscript_package") / "prepack.py"
WRONG_NUMBERS, NO_XNNPACK = 3, 5
SECONDS = 3600
WAY_OUT = "name the python of an environment with torch 2.1 to 2.12: python -m venv env; env/bin/pip install torch==2.1.0 'numpy<2'"


def prepack(python: str, source: Path, destination: Path) -> str:
    """Leave the file in ``destination`` and return a sentence of what made and ran it.

    Raises:
        TargetUnavailable: there is no such Python, or its torch has no XNNPACK or fails.
        BuildFailed: the file computes something else than that it is made of.
    """
    command = [python, "-I", str(SCRIPT), str(source), str(destination)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetUnavailable(f"prepack: {python} cannot be run: {error}", fix=WAY_OUT) from error
    found = _last(done.stdout)
    if done.returncode == WRONG_NUMBERS:
        said = f"largest difference {found['worst']:.1e} of the largest value"
        raise BuildFailed(f"torch {found['torch']} lays out weights that compute something else", [said], "leave --set prepack out")
    if done.returncode or not destination.is_file():
        lines = [str(found["error"])] if "error" in found else done.stderr.strip().splitlines()[-1:]
        raise TargetUnavailable(f"prepack: {python} made no {destination.name}", lines, WAY_OUT)
    return (
        f"{destination.name} ({size(destination.stat().st_size)}) was made and run by torch {found['torch']}, and agrees there with "
        f"{source.name} within {found['worst']:.0e} of the largest value; it is not run here, as torch 2.13 has no XNNPACK."
    )


def _last(text: str) -> dict[str, Any]:
    """Return the JSON of the last line; nothing where there is none."""
    lines = text.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found
