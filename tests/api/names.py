"""Holds the names that a file uses of TensorRT against what its releases have, with the line of each that one has not."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.api.bindings import Api, Member
from tests.api.reader import ANY, Use, uses

# The enumerations whose names a build file holds, by its fields.
FIELDS = {
    "network_flags": "NetworkDefinitionCreationFlag",
    "builder_flags": "BuilderFlag",
    "cleared_builder_flags": "BuilderFlag",
    "memory_pool_limits": "MemoryPoolType",
    "profiling_verbosity": "ProfilingVerbosity",
    "hardware_compatibility_level": "HardwareCompatibilityLevel",
    "compute_capabilities": "ComputeCapability",
}


@dataclass(frozen=True, order=True)
class Problem:
    """A name that a release has not."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def problems(path: Path, apis: Sequence[Api], oldest: Api | None = None) -> list[Problem]:
    """What the file uses that one of the releases has not, the oldest included.

    A function that asks for a name first is not held against a release without it. In none of ``apis``, though, is never
    right, whatever was asked: a precision's flag that is set where it is there gives another precision where it is not.
    """
    found = set()
    for use in uses(path, apis):
        lacking = [api for api in apis if _lacks(api, use)]
        # A class that a release has not is reported where the file takes it from the module.
        held = [api for api in (*apis, *([oldest] if oldest else [])) if use.owner in api.classes or not use.owner]
        blamed = lacking if len(lacking) == len(apis) else [api for api in held if _lacks(api, use) and not _excused(api, use)]
        name = f"{use.owner or 'trt'}.{use.name}"
        if blamed:
            found.add(Problem(path.name, use.line, f"{name} is not in {', '.join(api.label for api in blamed)}"))
        for api in apis:
            if wrong := _wrong_arguments(use, _member(api, use)):
                found.add(Problem(path.name, use.line, f"{name}: {wrong} in {api.label}"))
    return sorted(found)


def build_problems(path: Path, apis: Sequence[Api]) -> list[Problem]:
    """The names that the file writes into a field of a build file, or takes where there is none, and that a release has not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for field, value in _fields(tree):
        known = [api for api in apis if FIELDS[field] in api.enums]
        for name, line in _capitals(value):
            if lacking := [api.label for api in known if name not in api.enums[FIELDS[field]]]:
                found.add(Problem(path.name, line, f"{FIELDS[field]}.{name} is not in {', '.join(lacking)}"))
    return sorted(found)


def _fields(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The fields of a build file in dictionaries that stand in the source, assigned by key, and in defaults of `get`."""
    for node in ast.walk(tree):
        pairs: list[tuple[ast.expr | None, ast.expr]] = []
        if isinstance(node, ast.Dict):
            pairs = [*zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.Assign):
            pairs = [(target.slice, node.value) for target in node.targets if isinstance(target, ast.Subscript)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 2:
            pairs = [(node.args[0], node.args[1])]
        yield from ((str(key.value), value) for key, value in pairs if isinstance(key, ast.Constant) and key.value in FIELDS)


def _capitals(value: ast.expr) -> Iterator[tuple[str, int]]:
    for node in ast.walk(value):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isupper():
            yield node.value, node.lineno


def _member(api: Api, use: Use) -> Member | None:
    return api.classes.get(use.owner, {}).get(use.name) if use.owner else api.names.get(use.name)


def _lacks(api: Api, use: Use) -> bool:
    return _member(api, use) is None


def _excused(api: Api, use: Use) -> bool:
    return any(name == ANY or not (name in api.names or any(name in members for members in api.classes.values())) for name in use.asked)


def _wrong_arguments(use: Use, member: Member | None) -> str:
    if member is None or member.parameters is None:
        return ""
    unknown = [word for word in use.keywords if word not in member.parameters]
    if unknown:
        return f"no argument {', '.join(unknown)}"
    return "too many arguments" if use.positional > len(member.parameters) else ""
