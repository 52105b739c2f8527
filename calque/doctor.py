"""What this machine and this installation have, and what converting here would miss."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "differs", "missing", "info"]

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# Calque is on no package index: it is installed from where it lies.
INSTALL = "in a checkout of Calque: pip install -c constraints.txt ."
INSTALL_CONVERT = "in a checkout of Calque: pip install -c constraints.txt '.[convert]'"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``note`` says what to do where something should be done."""

    what: str
    found: str
    status: Status
    note: str = ""


def examine() -> list[Finding]:
    """Return everything worth knowing before a conversion; nothing is imported but onnxruntime."""
    return [*_machine(), *_packages(), _providers()]


def can_load(findings: list[Finding]) -> bool:
    """Return whether artifacts can be loaded here: no core package is missing."""
    return not any(finding.status == "missing" and INSTALL_CONVERT not in finding.note for finding in findings)


def missing_for_convert() -> list[str]:
    """Return the packages that converting needs and that are not installed."""
    return [finding.what for finding in _packages() if finding.note == INSTALL_CONVERT]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> list[Finding]:
    python = platform.python_version()
    fits = sys.version_info >= (3, 11)
    free = shutil.disk_usage(Path.cwd()).free
    return [
        Finding("python", python, "ok" if fits else "differs", "" if fits else "Calque needs 3.11 or newer"),
        Finding("system", f"{platform.system()} {platform.machine()}", "info"),
        Finding("cores", str(cores()), "info", "usable by this process"),
        Finding("memory", _memory(), "info"),
        Finding("disk", f"{free / 1e9:.1f} GB free", "info", "in the current folder"),
    ]


def _memory() -> str:
    available, total = _bounded("MemAvailable"), total_memory()
    if available is None or total is None:
        return "unknown"
    return f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"


def total_memory() -> int | None:
    """Return the bytes of memory that this machine, or its container, has; None where nothing says so."""
    return _bounded("MemTotal")


def _bounded(entry: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return min(values[entry], _memory_limit() or values[entry])


def _memory_limit() -> int | None:
    """Return the limit of the container, where there is one."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _packages() -> list[Finding]:
    pinned = _pinned()
    return [
        _package(name, pinned.get(_canonical(name)), INSTALL_CONVERT if for_convert else INSTALL) for name, for_convert in _requirements()
    ]


def _requirements() -> list[tuple[str, bool]]:
    """Return what calque and calque[convert] require by name, and whether it is for converting alone."""
    try:
        lines = importlib.metadata.requires("calque") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        convert = project["optional-dependencies"]["convert"]
        return [(name, False) for name in project["dependencies"]] + [(name, True) for name in convert]
    parsed = ((re.split(r"[^\w.-]", line, maxsplit=1)[0], re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)) for line in lines)
    return [(name, extra is not None) for name, extra in parsed if extra is None or extra[1] == "convert"]


def _package(name: str, wanted: str | None, install: str) -> Finding:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "–", "missing", install)
    # A local version such as 2.13.0+cpu is another build of the same version.
    if wanted is None or found.split("+")[0] == wanted:
        return Finding(name, found, "ok")
    return Finding(name, found, "differs", f"tested with {wanted}")


def _pinned() -> dict[str, str]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines() if CONSTRAINTS.is_file() else []
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_canonical(name): version.strip() for name, version in pins}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _providers() -> Finding:
    try:
        import onnxruntime
    except ImportError as error:
        return Finding("onnxruntime providers", "–", "missing", f"onnxruntime cannot be imported: {error}; {INSTALL}")
    return Finding("onnxruntime providers", ", ".join(onnxruntime.get_available_providers()), "info")
