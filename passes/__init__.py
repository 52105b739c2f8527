"""Passes: rewrites of the traced graph. One file each, named as users type it; the file is found by its name.

A pass is a frozen dataclass whose fields are its options, with ``apply(model) -> Rewrites`` and ``after``, the passes that
must have run before it. ``after`` is checked and never used to sort: a plan is a literal list. Other distributions add
passes by entry points of the group ``calque.passes``: see docs/adding.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from calque import plugins
from calque.errors import RecipeError, UsageError
from calque.options import construct
from calque.suggest import nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from calque.traced import TracedModel


# The passes that a precision asks for, and the options of each that it decides.
STORING = {
    "cast_precision": ("dtype", "arithmetic"),
    "quantize_activations": ("mode", "format"),
    "quantize_weights": ("bits", "format"),
}


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


@runtime_checkable
class Calibrated(Protocol):
    """A pass that may measure on text."""

    @property
    def calibrated(self) -> bool:
        """Whether it does, as its options are."""
        ...


def calibrated(rewrite: Pass) -> bool:
    """Return whether a pass measures on text."""
    return isinstance(rewrite, Calibrated) and rewrite.calibrated


def names() -> list[str]:
    """Return the name of every pass, plug-ins' too."""
    return sorted({*built_in(), *plugins.names(plugins.PASSES)})


def built_in() -> list[str]:
    """Return the name of every pass of Calque's own."""
    return sorted(module.name for module in iter_modules(__path__))


def name_of(rewrite: Pass) -> str:
    """Return the name of a pass, which its class is called after: FuseRmsNorm is fuse_rms_norm."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(rewrite).__name__).lower()


def class_name(name: str) -> str:
    """Return what the class of the pass called ``name`` is called."""
    return "".join(word.capitalize() for word in name.split("_"))


def find(name: str) -> type[Pass]:
    """Return the class of the pass called ``name``.

    Raises:
        RecipeError: no such pass, with those there are.
        UsageError: several passes of that name.
        TargetUnavailable: it comes from a plug-in that is broken.
    """
    if name not in names():
        raise RecipeError(f"there is no pass {name!r}{nearest(name, names())}", fix=f"passes: {', '.join(names())}")
    entry = plugins.claimed(plugins.PASSES, name, name in built_in())
    found: type[Pass] = plugins.load(entry, _faults) if entry else getattr(import_module(f"calque.passes.{name}"), class_name(name))
    return found


def _faults(found: Any, name: str) -> Iterator[str]:
    """Yield what keeps the object of an entry point from being the pass called ``name``."""
    if not isinstance(found, type) or not is_dataclass(found):
        yield f"it is no dataclass but {found!r}"
        return
    if found.__name__ != class_name(name) or not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z][a-z0-9]*)*", name):
        yield f"pass {name!r} and class {found.__name__} do not fit: fuse_rms_norm is the class FuseRmsNorm"
    if not isinstance(getattr(found, "after", None), frozenset):
        yield "it has no `after`, a frozenset of the passes that it needs before it"
    if not callable(getattr(found, "apply", None)):
        yield "it has no method apply(model)"
    needed = [field.name for field in fields(found) if field.init and field.default is MISSING and field.default_factory is MISSING]
    if needed:
        yield f"its options need defaults: {', '.join(needed)}"


def load(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """Return the pass called ``name`` with ``options`` as its fields.

    Raises:
        RecipeError: no such pass, or no such option, with what there is.
    """
    made: Pass = construct(find(name), options or {}, f"pass {name}")
    return made


def options_of_passes(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a recipe's options say of passes, by pass and option: those whose name has a dot.

    ``quantize_weights.group: 64`` is the option ``group``; ``quantize_weights.overrides.lm_head.weight: keep`` the entry
    ``lm_head.weight`` of the mapping ``overrides``.

    Raises:
        RecipeError: entries of an option that is given as something else than a mapping too.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        if "." not in key:
            continue
        name, option, *entry = key.split(".", 2)
        given = found.setdefault(name, {})
        if not entry:
            given[option] = {**value, **given.get(option, {})} if isinstance(value, Mapping) else value
            continue
        entries = given.setdefault(option, {})
        if not isinstance(entries, dict):
            raise RecipeError(f"{name}.{option} is given as {entries!r} and entry by entry", fix="leave one of the two out")
        entries[entry[0]] = value
    return found


def with_options(plan: Sequence[Pass], options: Mapping[str, Any]) -> tuple[Pass, ...]:
    """Return the plan with what a recipe's options say of its passes; options without a dot are the target's.

    Raises:
        RecipeError: no such pass, no such option of it, or a value that it cannot take.
        UsageError: a pass that is not in the plan.
    """
    of_passes = options_of_passes(options)
    here = [name_of(rewrite) for rewrite in plan]
    for name in of_passes:
        find(name)
    if absent := [name for name in of_passes if name not in here]:
        raise UsageError(
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not among the passes of this target and precision",
            [f"options: {key}" for key in options if key.partition(".")[0] in absent],
            f"its passes: {', '.join(here) or 'none'}",
        )
    tuned = []
    for rewrite, name in zip(plan, here, strict=True):
        own: Any = rewrite
        kept = {field.name: getattr(rewrite, field.name) for field in fields(own) if field.init}
        tuned.append(load(name, {**kept, **of_passes[name]}) if name in of_passes else rewrite)
    return tuple(tuned)


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
    if len(caches := [name for name in sorted(done) if name.startswith("cache_")]) > 1:
        wrong.append(f"{' and '.join(caches)} both settle the cache, and only the first of them would")
    if wrong:
        raise UsageError("the passes stand in an order that cannot work", wrong, "reorder them in the recipe")


def check_precision(precision: str, listed: Sequence[Pass], wanted: Sequence[Pass]) -> None:
    """Leave quietly if a recipe's own passes store weights as its target's would for that precision.

    Raises:
        UsageError: weights would be of another type than the manifest says.
    """
    if list(_storing(listed)) != list(_storing(wanted)):
        unwanted = dict.fromkeys(name for rewrite in listed if (name := name_of(rewrite)) in STORING)
        asked = ", ".join(_storing(wanted)) or f"no {', '.join(unwanted)}"
        raise UsageError(f"precision: {precision} and the list of passes disagree", fix=f"its list takes {asked}")


def _storing(plan: Sequence[Pass]) -> Iterator[str]:
    """Yield what each pass stores weights or activations as, as far as that is the precision's to say."""
    for rewrite in plan:
        if (name := name_of(rewrite)) in STORING:
            yield f"{name} with {', '.join(f'{option}: {getattr(rewrite, option)}' for option in STORING[name])}"


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
