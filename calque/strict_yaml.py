"""YAML read as YAML 1.2 means it, with the line of every key, refusing what would be a silent mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from calque.errors import RecipeError

Location = tuple[str | int, ...]

# A recipe takes a few hundred bytes and three levels. What is larger is no recipe, and is refused before it costs time.
LARGEST = 64 << 10
DEEPEST = 16
SHAPE = "docs/recipes.md says what a recipe may hold"


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
        RecipeError: no such file, larger than any recipe, not UTF-8, not YAML, nested too deeply, a key given twice, an alias,
            or a tag; with its line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        fix = "name an existing recipe file; --recipe takes every name after it, so that a MODEL must stand before"
        raise RecipeError(f"{path} cannot be read: {reason}", fix=fix) from error
    if len(content) > LARGEST:
        raise RecipeError(f"{path} is larger than {LARGEST // 1024} KiB, as no recipe is", fix="name a recipe file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = [f"line {_line(content[: error.start].decode('latin-1'))}: {error.reason} at byte {error.start}"]
        raise RecipeError(f"{path} is not UTF-8 text", where, "save the file as UTF-8") from error
    return parse_document(text, str(path))


def parse_document(text: str, origin: str) -> Document:
    """Return what the text holds; ``origin`` is what error messages call it.

    Raises:
        RecipeError: not YAML, nested too deeply, a key given twice, an alias, a tag, or a character that is no text; with its line.
    """
    try:
        _check_depth(text, origin)
        node = _CoreSchemaLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = [f"line {mark.line + 1 if mark else 1}: {error.problem or error.context}"]
        raise RecipeError(f"{origin} is not valid YAML", where, f"correct this line; {SHAPE}") from error
    except ReaderError as error:
        where = [f"line {_line(text[: error.position])}: character {error.character!r}: {error.reason}"]
        raise RecipeError(f"{origin} is not valid YAML", where, "name a recipe file; this one holds something that is no text") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not valid YAML", [str(error)], SHAPE) from error
    if node is None:
        return Document(None, {})
    lines: dict[Location, int] = {}
    problems: list[tuple[int, str]] = []
    data = _build(node, (), lines, problems, set())
    if problems:
        where = [f"line {line}: {problem}" for line, problem in sorted(problems)]
        raise RecipeError(f"{_count(len(problems))} in {origin}", where, f"write plain values; {SHAPE}")
    return Document(data, lines)


def _check_depth(text: str, origin: str) -> None:
    depth = 0
    for event in yaml.parse(text, _CoreSchemaLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            where = [f"line {event.start_mark.line + 1 if event.start_mark else 1}: more than {DEEPEST} levels"]
            raise RecipeError(f"{origin} is nested too deeply", where, "recipes are two or three levels deep")


def _line(before: str) -> int:
    """Return the line that the text after ``before`` begins on."""
    return before.count("\n") + 1


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
        elif not _is_text(key):
            problems.append((line, f"key {key[:40]!r} holds a character that is no text"))
        elif (*at, key) in lines:
            problems.append((line, f"key `{key[:40]}` is given twice, first on line {lines[(*at, key)]}"))
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
        problems.append((line, f"{text[:40]!r} is not a {kind}"))
        return None
    if kind != "str":
        problems.append((line, f"a tag, !!{kind}; recipes hold plain values"))
    elif not _is_text(text):
        problems.append((line, f"{text[:40]!r} holds a character that is no text"))
    return text


def _is_text(value: str) -> bool:
    r"""Return whether the value can be printed and be a file's name: "\0" and half a surrogate pair, which YAML can escape, cannot."""
    return not any((character < " " and character not in "\t\n") or "\ud800" <= character <= "\udfff" for character in value)
