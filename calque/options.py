"""Options given by name become the fields of a frozen dataclass, types and choices checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from calque.errors import RecipeError
from calque.suggest import nearest

Chosen = TypeVar("Chosen")


def construct(cls: type[Chosen], options: Mapping[str, Any], owner: str) -> Chosen:
    """Return ``cls`` with ``options`` as its fields; ``owner`` is what a message calls it.

    Raises:
        RecipeError: every option that it does not have, or whose value it cannot take.
    """
    from pydantic import TypeAdapter, ValidationError

    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(known)):
        raise RecipeError(
            f"{owner} has no option {', '.join(unknown)}{nearest(unknown[0], known)}", fix=f"its options: {', '.join(known) or 'none'}"
        )
    try:
        return TypeAdapter(cls).validate_python(dict(options), strict=False)
    except ValidationError as error:
        raise RecipeError(
            f"{owner} cannot take these options", [_line(fault) for fault in error.errors()], "change their values"
        ) from error


def _line(fault: Any) -> str:
    """Return what one option, or what some together, cannot be."""
    place = ".".join(str(part) for part in fault["loc"])
    return f"{place}: {fault['msg']}; found {fault['input']!r}" if place else str(fault["msg"]).removeprefix("Value error, ")
