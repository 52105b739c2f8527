"""Passes: rewrites of the traced graph. One file each, named as users type it; the file is found by its name.

A pass is a frozen dataclass whose fields are its options, with ``apply(model) -> Rewrites`` and ``after``, the passes that
must have run before it. ``after`` is checked and never used to sort: a plan is a literal list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from calque.errors import RecipeError, UsageError
from calque.options import construct

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


@runtime_checkable
class ChangesOutputs(Protocol):
    """A pass after which the model gives something else, so that it also says what is to be expected."""

    def expected(self, eager: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Return what the outputs of the untouched model for one row alone become."""
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
    return {name: done.count for name, done in run_all(plan, model).items()}


def run_all(plan: Sequence[Pass], model: TracedModel) -> dict[str, Rewrites]:
    """Return what each pass did and left alone, by name; the graph is verified after each."""
    check_order(plan)
    done: dict[str, Rewrites] = {}
    for rewrite in plan:
        before, now = done.get(name_of(rewrite), Rewrites(0)), run_one(rewrite, model)
        done[name_of(rewrite)] = Rewrites(before.count + now.count, (*before.skipped, *now.skipped))
    return done


def run_one(rewrite: Pass, model: TracedModel) -> Rewrites:
    """Return what one pass did; the graph is verified after it."""
    done = rewrite.apply(model)
    model.finish_rewrite()
    return done


def expected(plan: Sequence[Pass], outputs: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Return what the untouched model's outputs for one row become by the passes that change what a model gives."""
    for rewrite in plan:
        if isinstance(rewrite, ChangesOutputs):
            outputs = rewrite.expected(outputs)
    return outputs
