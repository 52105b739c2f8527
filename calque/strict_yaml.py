"""YAML read as YAML 1.2 means it, with the line of every key, refusing what would be a silent mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calque.errors import RecipeError

Location = tuple[str | int, ...]


class _CoreSchemaLoader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema: `no`, `on`, `1:30` and dates are text. Source: YAML 1.2.2, 10.3.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, the loader's own class attribute


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
):
    _CoreSchemaLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True)
class Document:
    """What a YAML text holds, and the line each value begins on: ``lines[("dims", "batch_size", 0)]``."""

    data: Any
    lines: dict[Location, int]

    def line(self, location: Location) -> int:
        """Return the line of the value, or of the nearest thing around it that the text holds."""
        while location not in self.lines and location:
            location = location[:-1]
        return self.lines.get(location, 1)


def read_document(path: Path) -> Document:
    """Return what the file holds.

    Raises:
        RecipeError: no such file, not UTF-8, not YAML, a key given twice, an alias, or a tag; with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}", fix="save the file as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", fix="name an existing recipe file") from error
    return parse_document(text, str(path))


def parse_document(text: str, origin: str) -> Document:
    """Return what the text holds; ``origin`` is what error messages call it."""
    try:
        node = _CoreSchemaLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{origin} is not valid YAML", [f"line {line}: {error.problem or error.context}"]) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not valid YAML", [str(error)]) from error
    except RecursionError as error:
        raise RecipeError(f"{origin} is nested too deeply", fix="recipes are two or three levels deep") from error
    if node is None:
        return Document(None, {})
    lines: dict[Location, int] = {}
    problems: list[tuple[int, str]] = []
    data = _build(node, (), lines, problems, set())
    if problems:
        raise RecipeError(f"{_count(len(problems))} in {origin}", [f"line {line}: {problem}" for line, problem in sorted(problems)])
    return Document(data, lines)


def parse_value(text: str) -> Any:
    """Return one scalar or flow collection as a recipe would hold it: ``4`` -> 4, ``true`` -> True, ``any`` -> "any"."""
    return parse_document(text, f"the value {text!r}").data


def _count(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"


def _build(node: yaml.Node, at: Location, lines: dict[Location, int], problems: list[tuple[int, str]], seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if id(node) in seen:
        problems.append((line, "an alias (*name); write the value out"))
        return None
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return {key: _build(value, (*at, key), lines, problems, seen) for key, value in _keys(node, at, lines, problems)}
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_build(item, (*at, index), lines, problems, seen) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag.startswith("tag:yaml.org,2002:"):
        return _scalar(node, line, problems)
    problems.append((line, f"a tag, {node.tag}; recipes hold plain values"))
    return None


def _keys(
    node: yaml.MappingNode, at: Location, lines: dict[Location, int], problems: list[tuple[int, str]]
) -> Iterator[tuple[str, yaml.Node]]:
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append((line, "a key that is not text"))
        elif (*at, key) in lines:
            problems.append((line, f"key `{key}` is given twice, first on line {lines[(*at, key)]}"))
        else:
            lines[(*at, key)] = line
            yield key, value


def _scalar(node: yaml.ScalarNode, line: int, problems: list[tuple[int, str]]) -> Any:
    text: str = node.value
    kind = node.tag.rpartition(":")[2]
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError):
        problems.append((line, f"{text!r} is not a {kind}"))
        return None
    if kind != "str":
        problems.append((line, f"a tag, !!{kind}; recipes hold plain values"))
    return text
