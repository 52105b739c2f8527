"""The fastest artifact of several on this machine: each is converted and proved, then all are measured side by side."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calque.artifact import Artifact
from calque.bench import Bench, bench
from calque.errors import CalqueError, ParityFailed, TargetUnavailable, Unsupported, WontFit
from calque.recipe import Recipe
from calque.staging import staging
from calque.validation.report import Report

if TYPE_CHECKING:
    from calque.targets import Chooses

# What one candidate may fail with while the others go on; that a model or a recipe cannot be read befalls them all.
ITS_OWN = (ParityFailed, Unsupported, TargetUnavailable, WontFit)


def convert_fastest(
    recipe: Recipe, target: Chooses, out: Path, convert: Callable[..., Artifact], *, force: bool, progress: Callable[[str], None]
) -> Artifact:
    """Leave the fastest of the target's candidates in ``out``, proved, its report saying what was measured; ``convert`` makes each.

    Raises:
        CalqueError: no candidate could be made, with the reason of each; or what befalls them all.
    """
    with staging(out, force) as folder, TemporaryDirectory(dir=folder, prefix=".candidates-") as scratch:
        made: dict[str, Artifact] = {}
        failed: dict[str, CalqueError] = {}
        for name in target.candidates_of(recipe.precision):

            def tell(stage: str, name: str = name) -> None:
                progress(f"{name}: {stage}")

            try:
                made[name] = convert(candidate(recipe, name), Path(scratch, name), progress=tell)
            except ITS_OWN as error:
                failed[name] = error
        if not made:
            raise none_made(failed)
        rows, loop = measured(recipe, target, made, progress)
        picked = min(rows, key=lambda row: row["cost_ms"])["target"]
        for path in list(Path(scratch, picked).iterdir()):
            shutil.move(path, folder / path.name)
        left_out = [{"target": name, "error": said(error)} for name, error in failed.items()]
        choice = {"picked": picked, **loop, "candidates": [*rows, *left_out]}
        report = replace(Report.read(folder), choice=choice)
        report.noted(sentence(choice)).write(folder)
    return Artifact.read(out)


def candidate(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe of one candidate: options of passes are its own too, those of the target that chooses are not."""
    of_passes = {key: value for key, value in recipe.options.items() if "." in key}
    return recipe.model_copy(update={"target": name, "options": of_passes})


def measured(
    recipe: Recipe, target: Chooses, made: Mapping[str, Artifact], progress: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row for each candidate, in ``cost_ms`` what is compared, and how they were measured."""
    longest = min((length for artifact in made.values() if (length := artifact.limits.max_length)), default=None)
    prompt, new = recipe.dims.sequence_length[1], target.new_tokens
    if longest is not None:  # a generator's last token is never fed
        generates = any(artifact.states for artifact in made.values())
        new = max(2, min(new, longest // 2)) if generates else new
        prompt = max(1, min(prompt, longest - (new - 1 if generates else 0)))
    asked = Bench((prompt,), new, target.rounds, recipe.threads, recipe.dims.batch_size[1])
    found = bench([artifact.folder for artifact in made.values()], asked, progress)
    rows = []
    for name, row in zip(made, found["artifacts"], strict=True):
        [figures] = row["lengths"]
        rows.append({"target": name, "cost_ms": target.cost(figures, new), "peak_rss_bytes": row["peak_rss_bytes"], **figures})
    loop = {"judged_by": target.judged_by if found["kind"] == "generator" else "call", "new_tokens": new}
    return rows, {**loop, **{key: found[key] for key in ("threads", "rounds", "batch_size", "prompt_tokens", "notes")}}


def none_made(failed: Mapping[str, CalqueError]) -> CalqueError:
    """Return what to say where every candidate failed: the kind of the first failure, with the reasons of all."""
    first = next(iter(failed.values()))
    if len(failed) == 1:
        return first
    return type(first)("no candidate could be converted", [f"{name}: {said(error)}" for name, error in failed.items()], first.fix)


def said(error: CalqueError) -> str:
    """Return what failed and where, in one line."""
    return "; ".join((error.what, *error.where[:3]))


def sentence(choice: Mapping[str, Any]) -> str:
    """Return the sentence that says what was picked, and by what."""
    rows = sorted((row for row in choice["candidates"] if "cost_ms" in row), key=lambda row: row["cost_ms"])
    costs = ", ".join(f"{row['target']} {row['cost_ms']:.1f} ms" for row in rows)
    [length] = choice["prompt_tokens"]
    what = {
        "answer": f"an answer of {choice['new_tokens']} tokens after {length}",
        "prompt": f"a prompt of {length} tokens",
        "step": f"each token after {length}",
        "call": f"a call of {length} tokens",
    }[choice["judged_by"]]
    out = "".join(f" {row['target']} was left out: {row['error']}." for row in choice["candidates"] if "error" in row)
    return f"{choice['picked']} was the fastest here, by {what}: {costs}.{out}"
