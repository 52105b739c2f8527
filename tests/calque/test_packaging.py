"""The wheel and the source archive, built from a copy of the tree, hold every module once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PACKAGES: dict[str, str] = SETUPTOOLS["package-dir"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the source archive, and with the wheel that was built from that archive's content."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, tree / name)
    run_backend(tree, f"build_sdist({str(out)!r})")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "source", filter="data")
    run_backend(next((out / "source").iterdir()), f"build_wheel({str(out)!r})")
    return out


def run_backend(folder: Path, call: str) -> None:
    code = f"import setuptools.build_meta as backend; backend.{call}"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def test_the_wheel_holds_every_module_and_data_file_once(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    for package, folder in PACKAGES.items():
        place = package.replace(".", "/")
        packed = {name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == place and name.endswith(".py")}
        assert packed == modules(ROOT / folder), package
    assert {name.split("/")[0] for name in names} == {"calque", next(name for name in names if "dist-info" in name).split("/")[0]}
    for path in [
        *ROOT.glob("recipes/*.yaml"),
        *ROOT.glob("recipes/*.json"),
        *ROOT.glob("targets/*.json"),
        *ROOT.glob("validation/*.jinja"),
        *ROOT.glob("targets/tensorrt_package/*.py"),
        *(path for path in ROOT.glob("calque/models/**/*") if path.is_file()),
    ]:
        place = path.relative_to(ROOT).as_posix()
        assert (place if place.startswith("calque/") else f"calque/{place}") in names
    assert {"calque/py.typed", "calque/constraints.txt", "calque/shrink.yaml"} < set(names)


def test_the_source_archive_holds_every_module_once(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for folder in PACKAGES.values():
        assert {f"{folder}/{name}" for name in modules(ROOT / folder)} <= set(names)
    assert {f"targets/{path.relative_to(ROOT / 'targets')}" for path in ROOT.glob("targets/tensorrt_package/*.py")} <= set(names)
    assert [name for name in names if name.startswith(("calque/passes", "calque/targets", "tests"))] == []


def test_what_the_wheel_holds_can_be_imported(built: Path) -> None:
    unpacked = built / "unpacked"
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(unpacked)
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code, *PACKAGES], cwd=built, env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [Path(line).is_relative_to(unpacked) for line in result.stdout.split()] == [True] * len(PACKAGES)
