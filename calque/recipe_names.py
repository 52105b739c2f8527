"""The names in a recipe that its schema leaves open: targets and their options, passes, scenarios, the task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from calque import conversion, passes, targets, tasks
from calque.choices import QUANTIZED
from calque.errors import RecipeError, Unsupported, UsageError
from calque.recipe import Recipe
from calque.recipe_errors import Problem
from calque.strict_yaml import Location
from calque.suggest import nearest
from calque.validation import scenarios


def problems(recipe: Recipe) -> list[Problem]:
    """Return every name and value that nothing here can follow, each with its place in the recipe; no model is looked at."""
    return [*_targets(recipe), *_passes(recipe), *_scenarios(recipe), *_task(recipe)]


def _targets(recipe: Recipe) -> Iterator[Problem]:
    axis = recipe.matrix.target if recipe.matrix else None
    places: dict[str, Location] = {recipe.target: ("target",)}
    if axis:
        places = {name: ("matrix", "target", index) for index, name in enumerate(axis)}
    for name, place in places.items():
        if name not in targets.names():
            yield place, f"there is no target `{name}`{nearest(name, targets.names())}; targets: {', '.join(targets.names())}"
        else:
            yield from _options(recipe, name)


def _options(recipe: Recipe, target: str) -> Iterator[Problem]:
    known = [field.name for field in fields(targets.load(target))]  # type: ignore[arg-type]  # a protocol's classes are dataclasses
    unknown = [key for key in recipe.options if key not in known and "." not in key]
    for key in unknown:
        yield ("options", key), f"target {target} has no such option{nearest(key, known)}; its options: {', '.join(known) or 'none'}"
    if unknown:
        return
    try:
        targets.make(target, recipe.options)
    except RecipeError as error:
        for line in error.where:
            key, _, message = line.partition(": ")
            yield ("options", key.split(".")[0]), f"target {target}: {message}"
        return
    if recipe.passes is None:
        yield from _options_of_passes(recipe, target)


def _options_of_passes(recipe: Recipe, target: str) -> Iterator[Problem]:
    """Yield what is wrong with the options of each pass; where it differs by precision, one of those asked for counts that quantizes."""
    made = targets.make(target, recipe.options)
    axis = recipe.matrix.precision if recipe.matrix else None
    asked = sorted((name for name in axis or (recipe.precision,) if name in made.precisions), key=lambda name: name not in QUANTIZED)
    if not asked:
        return
    try:
        plan = made.passes(asked[0])
    except UsageError:
        if axis:
            return  # the cell of that precision says so by itself
        raise
    dotted = [key for key in recipe.options if "." in key]
    for name in dict.fromkeys(key.partition(".")[0] for key in dotted):
        keys = [key for key in dotted if key.partition(".")[0] == name]
        try:
            passes.with_options(plan, {key: recipe.options[key] for key in keys})
        except UsageError as error:
            yield ("options", keys[0]), "; ".join((error.what, *(error.where if isinstance(error, RecipeError) else ()), error.fix))


def _passes(recipe: Recipe) -> Iterator[Problem]:
    if recipe.passes is None:
        return
    found = []
    for index, entry in enumerate(recipe.passes):
        try:
            passes.read_plan([entry])
        except RecipeError as error:
            found.append((("passes", index), "; ".join((error.what, *(error.where or (error.fix,))))))
    yield from found
    if found or recipe.target not in targets.names():
        return
    try:
        passes.check_order(conversion.plan_of(recipe, targets.make(recipe.target, {})))
    except UsageError as error:
        yield ("passes",), "; ".join((error.what, *error.where))


def _scenarios(recipe: Recipe) -> Iterator[Problem]:
    wanted = recipe.parity.scenarios
    if wanted == "all":
        return
    for name, hint in scenarios.unknown(wanted).items():
        yield ("parity", "scenarios", wanted.index(name)), f"no model has a scenario `{name}`{hint}"


def _task(recipe: Recipe) -> Iterator[Problem]:
    if recipe.task is None:
        return
    try:
        tasks.find(recipe.task)
    except Unsupported:
        return  # a task that there is, and no fault of the recipe's text: converting says so
    except UsageError as error:
        yield ("task",), f"{error.what}; {error.fix}"
