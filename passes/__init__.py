"""Passes: rewrites of the traced graph. One file each, named as users type it; the file is found by its name.

A pass is a frozen dataclass whose fields are its options, with ``apply(model) -> Rewrites`` and ``after``, the passes that
must have run before it. ``after`` is checked and never used to sort: a plan is a literal list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from calque.errors import RecipeError, UsageError
from calque.options import construct

if TYPE_CHECKING:
    from calque.traced import TracedModel


@dataclass(frozen=True)
class Rewrites:
    """How many places a pass rewrote, and which it left alone for what reason."""

    count: int
    skipped: tuple[tuple[str, str], ...] = ()


class Pass(Protocol):
    """One rewrite; applying it twice changes nothing the second time."""

    after: ClassVar[frozenset[str]]

    def apply(self, model: TracedModel) -> Rewrites:
        """Rewrite ``model`` in place and return what was done."""
        ...


def names() -> list[str]:
    """Return the name of every pass."""
    return sorted(module.name for module in iter_modules(__path__))


def name_of(rewrite: Pass) -> str:
    """Return the name of a pass: that of its file."""
    return type(rewrite).__module__.rpartition(".")[2]


def load(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """Return the pass called ``name`` with ``options`` as its fields.

    Raises:
        RecipeError: no such pass, or no such option, with what there is.
    """
    if name not in names():
        raise RecipeError(f"there is no pass {name!r}", fix=f"passes: {', '.join(names())}")
    module = import_module(f"calque.passes.{name}")
    cls = getattr(module, "".join(word.capitalize() for word in name.split("_")))
    made: Pass = construct(cls, options or {}, f"pass {name}")
    return made


def read_plan(entries: Iterable[str | Mapping[str, Any]]) -> tuple[Pass, ...]:
    """Return the passes that a recipe lists, by name or by name and options."""
    plan = []
    for entry in entries:
        if isinstance(entry, str):
            plan.append(load(entry))
        else:
            plan += [load(name, options or {}) for name, options in entry.items()]
    return tuple(plan)


def check_order(plan: Sequence[Pass]) -> None:
    """Leave quietly if each pass comes after those it needs.

    Raises:
        UsageError: all that stand too early.
    """
    done: set[str] = set()
    wrong = []
    for rewrite in plan:
        if missing := rewrite.after - done:
            wrong.append(f"{name_of(rewrite)} needs {', '.join(sorted(missing))} before it")
        done.add(name_of(rewrite))
    if wrong:
        raise UsageError("the passes stand in an order that cannot work", wrong, "reorder them in the recipe")


def run(plan: Sequence[Pass], model: TracedModel) -> dict[str, int]:
    """Return how many rewrites each pass made; the graph is verified after each."""
    check_order(plan)
    counts: dict[str, int] = {}
    for rewrite in plan:
        counts[name_of(rewrite)] = counts.get(name_of(rewrite), 0) + run_one(rewrite, model).count
    return counts


def run_one(rewrite: Pass, model: TracedModel) -> Rewrites:
    """Return what one pass did; the graph is verified after it."""
    done = rewrite.apply(model)
    model.finish_rewrite()
    return done
