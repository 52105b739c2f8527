"""Exports Hugging Face models to other runtimes and proves each artifact against the untouched eager model.

The names below are loaded when they are first used, so that ``import calque`` costs nothing and needs nothing installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calque.artifact import Artifact, Proof
    from calque.pipeline import convert
    from calque.recipe import Recipe
    from calque.runtime.session import load
    from calque.validation.validate import validate

__version__ = "0.1.0"

__all__ = ["Artifact", "Proof", "Recipe", "convert", "load", "validate"]

_HOMES = {
    "Artifact": "calque.artifact",
    "Proof": "calque.artifact",
    "Recipe": "calque.recipe",
    "convert": "calque.pipeline",
    "load": "calque.runtime.session",
    "validate": "calque.validation.validate",
}


def __getattr__(name: str) -> object:
    """Return a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
