"""Turns what pydantic found wrong with a recipe into lines a person can act on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from calque.errors import RecipeError
from calque.strict_yaml import Document, Location
from calque.suggest import nearest

Settings = TypeVar("Settings", bound=BaseModel)
Problem = tuple[Location, str]
# The line of a problem, infinite where no line holds it, and what is printed of it.
Ranked = tuple[float, str]

# Of a value that may be of any length.
LONGEST_SHOWN = 200

# In place of keys that must be there and are at fault, so that the others can be read.
_STAND_INS = {"model": "any", "target": "any"}

_WORDING = {
    "string_type": "must be text; put it in quotes",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}


# A value that was pasted by mistake may be as long as the file.
_LONGEST = 400


@dataclass(frozen=True)
class Origin:
    """Where the settings of a recipe were written: the name of its file, its lines, and which keys were flags instead."""

    name: str
    document: Document = field(default_factory=lambda: Document({}, {}))
    flags: frozenset[str] = frozenset()

    def error(self, problems: Iterable[Ranked]) -> RecipeError:
        """Return the error that lists the problems in the order of their lines."""
        return recipe_error([text for _, text in sorted(problems, key=lambda problem: problem[0])], self.name)

    def placed(self, at: Location, message: str) -> Ranked:
        """Return the line of a problem, infinite where a flag said it, and the problem with the line and the key before it."""
        text = f"{_dotted(at)}: {message}" if at else message
        if at and at[0] in self.flags:
            return float("inf"), text
        line = self.document.line(at)
        return line, f"line {line}: {text}" if self.document.lines else text


def recipe_error(problems: Sequence[str], origin: str) -> RecipeError:
    """Return the error that lists every problem found in ``origin``."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    shown = [line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…" for line in problems]
    return RecipeError(f"{count} in {origin}", shown, "docs/recipes.md lists every key")


def problems_of(error: ValidationError, model: type[BaseModel], origin: Origin) -> list[Ranked]:
    """Return one line for each problem; those of flags and of missing keys are to come last."""
    found: dict[tuple[float, str], str] = {}
    for detail in error.errors(include_url=False):
        if _follows_from_another(detail):
            continue
        at = _known_part(detail["loc"], model)
        if detail["type"] == "missing" and isinstance(at[-1], int):
            at = at[:-1]
        # The branches of a union each complain about one value: one line for it, holding the first complaint.
        key = _dotted(at)
        if detail["type"] == "missing" and at == detail["loc"]:
            found.setdefault((float("inf"), key), f"{key}: is missing, and there is no default")
        else:
            line, text = origin.placed(at, _message(detail, model))
            found.setdefault((line, key), text)
    return [(line, text) for (line, _), text in found.items()]


def problems_besides(
    error: ValidationError,
    settings: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], Settings],
    look_up: Callable[[Settings], Iterable[Problem]],
) -> list[Problem]:
    """Return what ``look_up`` finds in those keys of the settings that the error says nothing about."""
    faulty: set[str | int] = set()
    # Without a faulty matrix the target that it gave is missing too: once more, then.
    while more := {detail["loc"][0] for detail in error.errors(include_url=False) if detail["loc"]} - faulty:
        faulty |= more
        kept = {key: value for key, value in settings.items() if key not in faulty}
        stand_ins = {key: value for key, value in _STAND_INS.items() if key in faulty}
        try:
            found = look_up(read({**stand_ins, **kept}))
        except ValidationError as again:
            error = again
        else:
            return [(at, text) for at, text in found if at[0] not in faulty]
    return []


def _follows_from_another(detail: ErrorDetails) -> bool:
    """Return whether pydantic says this only because something else is wrong: a default it could not work out, items it dropped."""
    return detail["type"] == "default_factory_not_called" or (detail["type"] == "too_short" and bool(detail["input"]))


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return "is not a key of a recipe" + nearest(str(detail["loc"][-1]), _keys_at(detail["loc"][:-1], model))
    if kind == "literal_error":
        expected = detail["ctx"]["expected"].replace("'", "")
        return f"must be {expected}; found {value!r}" + nearest(str(value), expected.replace(" or ", ", ").split(", "))
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    if kind in ("missing", "too_long") and isinstance(value, list | tuple):
        # Among recipe keys only the ranges have a fixed length.
        return f"must be three whole numbers, min, typical, max; found {list(value)!r}"
    wording = _WORDING.get(kind) or detail["msg"][:1].lower() + detail["msg"][1:]
    found = repr(value)
    return f"{wording}; found {found if len(found) <= LONGEST_SHOWN else found[:LONGEST_SHOWN] + '…'}"


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the settings class that a field holds, optional or not."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _keys_at(location: Location, model: type[BaseModel]) -> list[str]:
    current: type[BaseModel] | None = model
    for part in location:
        current = _section(_fields(current).get(str(part))) if current else None
    return list(_fields(current)) if current else []


def _known_part(location: Location, model: type[BaseModel]) -> Location:
    """Return the location without pydantic's names of union branches, which no file holds."""
    current: type[BaseModel] | None = model
    kept: list[str | int] = []
    for index, part in enumerate(location):
        is_key = current is not None and (part in _fields(current) or index == len(location) - 1)
        if isinstance(part, int) or is_key:
            kept.append(part)
        current = _section(_fields(current).get(str(part))) if current and isinstance(part, str) else None
    return tuple(kept)


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
