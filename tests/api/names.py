"""Holds the names that a file uses of TensorRT against what its releases have, with the line of each that one has not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.api.bindings import Api, Member
from tests.api.reader import Use, uses


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

    What the file asks for first may be in one of ``apis`` alone, but not in the oldest alone: a precision's flag that is
    set where it is there gives an engine of another precision where it is not.
    """
    found = set()
    for use in uses(path, apis):
        lacking = [api for api in (*apis, *([oldest] if oldest else [])) if _member(api, use) is None]
        name = f"{use.owner or 'trt'}.{use.name}"
        if lacking and (not use.optional or all(api in lacking for api in apis)):
            found.add(Problem(path.name, use.line, f"{name} is not in {', '.join(api.label for api in lacking)}"))
        for api in apis:
            if wrong := _wrong_arguments(use, _member(api, use)):
                found.add(Problem(path.name, use.line, f"{name}: {wrong} in {api.label}"))
    return sorted(found)


def unknown_names(document: object, apis: Sequence[Api]) -> list[str]:
    """The names in capitals that stand anywhere in a document, as keys too, and are of no enumeration of one of the releases."""
    known = [{name for members in api.enums.values() for name in members} for api in apis]
    words = {word for word in _words(document) if len(word) > 1 and word == word.upper() and word.replace("_", "").isalnum()}
    words = {word for word in words if not word.replace("_", "").isdecimal()}
    return sorted(word for word in words if not all(word in names for names in known))


def _words(document: object) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for key, value in document.items():
            yield from _words(key)
            yield from _words(value)
    elif isinstance(document, (list, tuple)):
        for value in document:
            yield from _words(value)


def _member(api: Api, use: Use) -> Member | None:
    return api.classes.get(use.owner, {}).get(use.name) if use.owner else api.names.get(use.name)


def _wrong_arguments(use: Use, member: Member | None) -> str:
    if member is None or member.parameters is None:
        return ""
    unknown = [word for word in use.keywords if word not in member.parameters]
    if unknown:
        return f"no argument {', '.join(unknown)}"
    return "too many arguments" if use.positional > len(member.parameters) else ""
