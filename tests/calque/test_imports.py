"""The rules of the layout: who may import whom, links that equal the packaging table, sizes and names of files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import calque

ROOT = Path(__file__).parents[2]
FOLDERS = ("converters", "passes", "recipes", "runtime", "targets", "validation")
HEAVY = ("torch", "transformers", "optimum", "onnx", "onnxruntime", "tensorrt", "pydantic", "numpy", "rich", "yaml")

LONGEST_FILE = 400
LONGEST_FUNCTION = 50
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager"}

# What each folder may import of Calque, besides itself. `core` is every module of calque/ that is not listed here.
ALLOWED = {
    "converters": {"core"},
    "passes": {"core"},
    "validation": {"core"},
    "targets": {"core", "passes", "runtime"},  # a target's `open` returns the runtime's session
    # A plug-in's artifact is opened by its own target, found by its entry point.
    "runtime": {"calque.artifact", "calque.errors", "calque.plugins", "calque.session", "calque.states", "calque.tensors"},
    "recipes": set[str](),
}
# `calque validate` opens the artifact it checks; nothing else of validation/ knows where sessions come from.
EXCEPTIONS = {("calque.validation.validate", "calque.runtime")}
# Modules that join the folders; the public names of calque/__init__.py live in several of them.
JOINING = {"calque", "calque.pipeline", "calque.conversion", "calque.cli", "calque.commands", "calque.conformance"}
# They call the pipeline, or look up what passes, targets and scenarios there are.
JOINING |= {"calque.quality_gate", "calque.promotion", "calque.convert_command", "calque.recipe_names", "calque.resume"}
# Artifacts of several targets, made or opened.
JOINING |= {"calque.fastest", "calque.side_by_side"}
# It holds an artifact open by the runtime.
JOINING |= {"calque.bench_worker"}
# Read where nothing is installed, before anything else of Calque.
STANDARD_LIBRARY_ALONE = {"calque.artifact", "calque.errors", "calque.states"}


def python_files() -> Iterator[Path]:
    """Give every Python file of the repository; links are not followed, so none comes twice."""
    for parent, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("build", "dist", "__pycache__"))
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(".py"))


def module_name(path: Path) -> str:
    """Return the name a file is imported under: passes/fuse.py -> calque.passes.fuse."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in FOLDERS:
        parts.insert(0, "calque")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, wherever in it; `from calque import passes` counts as calque.passes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide which package a name comes from"
            found |= {f"{node.module}.{alias.name}" if node.module == "calque" else str(node.module) for alias in node.names}
    return found


def owner(module: str) -> str:
    """Return the folder that a module of Calque belongs to, or `core`."""
    second = module.split(".")[1] if "." in module else ""
    return second if second in FOLDERS else "core"


def is_allowed(importer: str, imported: str) -> bool:
    if imported.split(".")[0] != "calque" or importer in JOINING:
        return True
    if (importer, imported) in EXCEPTIONS:
        return True
    if importer in STANDARD_LIBRARY_ALONE:
        return imported in STANDARD_LIBRARY_ALONE
    if owner(importer) == "core":
        return owner(imported) == "core" and imported not in JOINING - {"calque"}
    if owner(importer) == owner(imported):
        return True
    return imported in ALLOWED[owner(importer)] or (owner(imported) in ALLOWED[owner(importer)] and imported not in JOINING)


def source_files() -> list[Path]:
    return [path for path in python_files() if path.relative_to(ROOT).parts[0] in ("calque", *FOLDERS)]


def test_every_import_follows_the_layout() -> None:
    broken = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in source_files()
        for imported in sorted(imports_of(path))
        if not is_allowed(module_name(path), imported)
    ]
    assert broken == []


def test_what_is_read_first_needs_the_standard_library_alone() -> None:
    for module in sorted(STANDARD_LIBRARY_ALONE):
        path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        foreign = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"calque", "__future__"}
        assert foreign == set(), path


def test_no_file_imports_a_root_folder_by_its_bare_name() -> None:
    # calque.passes and passes would be two copies of every class.
    bare = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in python_files()
        for imported in sorted(imports_of(path))
        if imported.split(".")[0] in FOLDERS
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("calque.recipe", "calque.errors", True),
        ("calque.recipe", "calque.targets", False),
        ("calque.recipe", "calque.pipeline", False),
        ("calque.pipeline", "calque.targets.onnxruntime", True),
        ("calque.artifact", "calque.recipe", False),
        ("calque.passes.fuse", "calque.traced", True),
        ("calque.passes.fuse", "calque.cli", False),
        ("calque.passes.fuse", "calque.passes.cast", True),
        ("calque.passes.fuse", "calque.targets", False),
        ("calque.targets.onnxruntime", "calque.passes.fuse", True),
        ("calque.targets.onnxruntime", "calque.validation", False),
        ("calque.validation.compare", "calque.targets", False),
        ("calque.runtime.session", "calque.artifact", True),
        ("calque.runtime.session", "calque.recipe", False),
    ],
)
def test_the_import_rule_can_tell_right_from_wrong(importer: str, imported: str, allowed: bool) -> None:
    assert is_allowed(importer, imported) is allowed


@pytest.mark.parametrize(
    "statement", ["import calque", "import calque.artifact, calque.errors, calque.states", "dir(__import__('calque'))"]
)
def test_importing_calque_pulls_in_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


def test_the_light_commands_import_nothing_that_converting_needs() -> None:
    forbidden = ("torch", "transformers", "optimum", "onnx", "pydantic", "safetensors", "huggingface_hub")
    modules = "calque.cli, calque.doctor, calque.inspection, calque.targets, calque.runtime.generate, calque.validation.validate"
    modules += ", calque.validation.render, calque.bench, calque.bench_worker"
    code = f"import {modules}\nimport sys\nprint(*(name for name in {forbidden} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == []


def test_every_public_name_exists() -> None:
    assert calque.__all__ == sorted(calque.__all__)
    assert {"Artifact", "Proof", "Recipe", "convert", "load", "validate"} == set(calque.__all__)
    for name in calque.__all__:
        assert getattr(calque, name).__name__ == name
        assert name in dir(calque)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(calque, "nothing")  # noqa: B009, a name that type checkers would refuse


def test_the_links_equal_the_packaging_table() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    table = {package.partition(".")[2]: folder for package, folder in setuptools["package-dir"].items() if package != "calque"}
    links = {path.name: os.readlink(path) for path in (ROOT / "calque").iterdir() if path.is_symlink()}
    assert links.pop("constraints.txt") == "../constraints.txt"
    assert links == {name: f"../{folder}" for name, folder in table.items()}
    assert sorted(table) == sorted(FOLDERS)
    assert sorted(setuptools["packages"]) == sorted(setuptools["package-dir"])


def test_every_packaged_folder_is_a_package_and_flat() -> None:
    # Scripts that artifacts carry are data: no package, and in the wheel by the table of data.
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for name in FOLDERS:
        assert (ROOT / name / "__init__.py").is_file(), name
        scripts = {ROOT / name / pattern.removesuffix("/*.py") for pattern in data.get(f"calque.{name}", []) if pattern.endswith("/*.py")}
        assert [path for path in scripts if (path / "__init__.py").exists()] == []
        nested = [path for path in (ROOT / name).iterdir() if path.is_dir() and any(path.glob("*.py")) and path not in scripts]
        assert nested == [], "a nested package works when editable and is missing from the wheel"


def test_the_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["convert"], *project["optional-dependencies"]["dev"]}
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert {name.lower().replace("_", "-") for name in wanted} - pinned == set()
    assert "torch==2.13.0" in lines


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        if (count := len(text.splitlines())) > LONGEST_FILE:
            long.append(f"{path.relative_to(ROOT)}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > LONGEST_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {count} lines")
    assert long == []


def test_no_name_is_vague() -> None:
    vague = []
    for path in python_files():
        if VAGUE_NAMES & set(path.stem.lower().split("_")):
            vague.append(str(path.relative_to(ROOT)))
        classes = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef))
        vague += [f"{path.relative_to(ROOT)}: {node.name}" for node in classes if VAGUE_NAMES & words_of(node.name)]
    assert vague == []


def words_of(name: str) -> set[str]:
    """Return the words of a class name in lower case: WeightManager -> weight, manager."""
    return set("".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).replace("_", " ").split())
