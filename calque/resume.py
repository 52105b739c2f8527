"""What a run need not do again: an artifact that this recipe, these bytes and these tools have made and proved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from calque import conversion, pipeline, plugins, tokenizer
from calque.artifact import Artifact, file_sha256
from calque.companions import CONFIG, companion_files
from calque.errors import ArtifactUnreadable
from calque.recipe import Recipe
from calque.validation.report import Report


def differences(recipe: Recipe, out: Path) -> list[str]:
    """Return why the recipe must be converted, one line a reason; nothing where ``out`` holds what it would give, proved.

    What costs least is looked at first: settings and versions, then the artifact's bytes, then the model's.

    Raises:
        CalqueError: the model cannot be read.
    """
    if not os.path.lexists(out):
        return [f"{out} does not exist"]
    try:
        artifact = Artifact.read(out)
        Report.read(out)
    except ArtifactUnreadable as error:
        return [error.what]
    return [*_settings(recipe, artifact), *_proof(recipe, artifact)] or artifact.damaged_files() or _source(recipe, artifact)


def _settings(recipe: Recipe, artifact: Artifact) -> Iterator[str]:
    wanted = json.loads(json.dumps(recipe.as_manifest()))
    for key in sorted({*wanted, *artifact.recipe}):
        if (now := wanted.get(key)) != (then := artifact.recipe.get(key)):
            yield f"recipe: {key} was {then!r}, is {now!r}"
    tools = {**pipeline.tool_versions(), **plugins.versions(recipe.target, artifact.passes)}
    for name in sorted({*tools, *artifact.tools}):
        # A target's own packages, and what built something of it, stand in the manifest alone.
        now = tools.get(name, _installed(name))
        if artifact.tools.get(name) != now:
            yield f"{name} was {artifact.tools.get(name)}, is {now}"
    if recipe.parity.text and recipe.parity.max_kl is not None:
        yield "the manifest does not hold the text that decides which layers are promoted"
    if recipe.calibration:
        yield "the manifest does not hold the text of the calibration"


def _installed(package: str) -> str | None:
    """Return the version of a package that is here; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _proof(recipe: Recipe, artifact: Artifact) -> Iterator[str]:
    checks = {"numerics": artifact.proof.numerics, "build": artifact.proof.build, "execution": artifact.proof.execution}
    needed = {"numerics", *(("build",) if recipe.require else ()), *(("execution",) if recipe.require == "execution" else ())}
    for name, check in checks.items():
        if check.status == "failed" or (check.status != "passed" and name in needed):
            yield f"{name}: {check.status.replace('_', ' ')}"


def _source(recipe: Recipe, artifact: Artifact) -> list[str]:
    with TemporaryDirectory(prefix="calque-resume-") as scratch:
        source = conversion.resolve(recipe, Path(scratch))
        if recipe.trust_remote_code and getattr(source.config, "auto_map", None):
            return ["the model runs code of its own, which the manifest does not hold"]
        described = source.describe()
        if described != artifact.source:
            changed = [key for key, value in described.items() if artifact.source.get(key) != value]
            return [f"source: {key} was {artifact.source.get(key)}, is {described[key]}" for key in changed]
        now = {path.relative_to(source.folder).as_posix(): file_sha256(path) for path in companion_files(source.folder)}
    made = {path.relative_to(artifact.folder).as_posix() for path in companion_files(artifact.folder)}
    del now[CONFIG]  # it was compared with the weights above; the copy may hold what a layout adds
    # A tokenizer.json may have been made for a model that has none.
    gone = (made & set(artifact.files)) - set(now) - {CONFIG, tokenizer.FILE}
    changed = [name for name, digest in now.items() if artifact.files.get(name) != digest]
    return [f"source: {name} is another" for name in changed] + [f"source: {name} is gone" for name in sorted(gone)]
