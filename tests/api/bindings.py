"""What a package of TensorRT's Python bindings offers, taken from the package itself: no TensorRT and no GPU is needed.

Wheels of bindings hold one module of C, which needs a few functions of TensorRT's libraries to be loaded, and no stubs. Libraries
that hold functions of those names, and nothing in them, are built beside it; it is imported in a process of its own, and its classes
are read there. What methods take and give stands in their docstrings, as pybind11 writes it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Prints every public name of a module with its kind and docstring, and those of its classes.
DUMP = """
import importlib, inspect, json, sys

def kind(value):
    return "class" if inspect.isclass(value) else "call" if callable(value) else "value"

def entry(owner, name):
    value = inspect.getattr_static(owner, name)
    if isinstance(value, property):
        return "value", value.fget.__doc__ or ""
    value = getattr(owner, name)
    if type(value) is owner:
        return "value", f"() -> {owner.__name__}"
    named = f"() -> {type(value).__name__}" if kind(value) == "value" else value.__doc__ or ""
    return kind(value), f"() -> {value.__name__}" if kind(value) == "class" else named

module = importlib.import_module(sys.argv[1])
public = [name for name in dir(module) if not name.startswith("_")]
classes = {name: getattr(module, name) for name in public if inspect.isclass(getattr(module, name))}
nested = [value for owner in classes.values() for value in vars(owner).values() if inspect.isclass(value)]
classes |= {value.__name__: value for value in nested if value.__name__ not in classes}
members = {name: {member: entry(owner, member) for member in dir(owner)} for name, owner in classes.items()}
enums = {name: list(owner.__members__) for name, owner in classes.items() if hasattr(owner, "__members__")}
names = {name: entry(module, name) for name in public + ["__name__", "__version__"]}
print(json.dumps({"version": module.__version__, "names": names, "classes": members, "enums": enums}))
"""

# Of C's own libraries, and weak; everything else that nm lists without a version is Python's.
_OF_PYTHON = re.compile(r"_?Py|_|dl(open|close|sym)$|pthread_")


@dataclass(frozen=True)
class Member:
    """A member of a class, or a name of the module: ``gives`` names a class, its own where it is one; None: not known.
    ``many``: a list of those.

    ``parameters``: what a call takes, in order and without self; None where there is no one signature to tell.
    """

    kind: str
    gives: str | None = None
    many: bool = False
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Api:
    """The names of one release: ``classes`` by name, each with its members; ``enums`` with their members alone."""

    label: str
    version: str
    names: dict[str, Member]
    classes: dict[str, dict[str, Member]]
    enums: dict[str, list[str]]


def fetched(requirement: str, folder: Path) -> Path:
    """The folder with the content of the wheel that the index has for a requirement and this Python."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the package index has no {requirement} for this Python:\n{done.stderr[-2000:]}"
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "content")
    return folder / "content"


def stub_libraries(module: Path, folder: Path) -> Path:
    """The folder with a library of every name that a module of TensorRT needs, each with every function it takes of them."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = re.findall(r"Shared library: \[(libnv\S+)\]", _printed(["readelf", "--dynamic", module]))
    symbols = [line.split()[-1] for line in _printed(["nm", "--dynamic", "--undefined-only", module]).splitlines()]
    functions = [name for name in symbols if "@" not in name and not _OF_PYTHON.match(name)]
    assert needed
    assert functions
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    for name in needed:
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)
    return folder


def enterprise(requirement: str, folder: Path) -> Api:
    """The API of a release of TensorRT, from its wheel of bindings on the package index."""
    content = fetched(requirement, folder)
    libraries = stub_libraries(content / "tensorrt_bindings" / "tensorrt.so", folder / "libraries")
    return read(requirement, "tensorrt_bindings", {"PYTHONPATH": str(content), "LD_LIBRARY_PATH": str(libraries)})


def installed_rtx() -> Api | None:
    """The API of TensorRT for RTX as it is installed beside Calque; None where it is not."""
    found = subprocess.run([sys.executable, "-c", "import tensorrt_rtx"], capture_output=True, check=False)
    return read("tensorrt_rtx", "tensorrt_rtx", {}) if found.returncode == 0 else None


def read(label: str, module: str, environment: dict[str, str]) -> Api:
    """The API of a module, imported in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", DUMP, module], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{label} was not imported:\n{done.stderr[-2000:]}"
    said = json.loads(done.stdout)
    known = set(said["classes"])
    names = {name: _member(kind, doc, known) for name, (kind, doc) in said["names"].items()}
    classes = {
        owner: {name: _member(kind, doc, known) for name, (kind, doc) in members.items()} for owner, members in said["classes"].items()
    }
    return Api(label, said["version"], names, classes, said["enums"])


def _member(kind: str, doc: str, known: set[str]) -> Member:
    """What a docstring's first line says; a class gives itself, whatever its own docstring."""
    first = doc.lstrip().partition("\n")[0]
    signature, arrow, result = first.rpartition(" -> ")
    overloaded = "Overloaded function" in doc
    if not arrow:
        # Overloads are numbered, each a signature of its own: they give what all of them give.
        results = {line.rpartition(" -> ")[2] for line in doc.splitlines() if re.match(r"\d+\. ", line)}
        result = results.pop() if overloaded and len(results) == 1 else ""
    # A class that was registered after this method stands there as C++ names it: nvonnxparser::IParserError.
    words = [word for found in re.findall(r"(\w+)(?![\w.])", result) for word in (found, found.removeprefix("I"))]
    gives = next((word for word in words if word in known), None)
    return Member(kind, gives, "[" in result, None if overloaded or not arrow or kind == "class" else _parameters(signature))


def _parameters(signature: str) -> tuple[str, ...] | None:
    # A default such as <DataType.FLOAT: 0> is no Python.
    text = re.sub(r"<[^<>]*>", "...", signature)
    try:
        [function] = ast.parse(f"def {text}: ...").body
    except SyntaxError:
        return None
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    if arguments.vararg or arguments.kwarg:
        return None
    return tuple(each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if each.arg != "self")


def _printed(command: list[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
