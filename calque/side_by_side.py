"""Artifacts of one model beside each other, whatever their targets: are their integers the same, how far apart are their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calque import targets
from calque.artifact import Artifact, rounds_activations
from calque.choices import QUANTIZED
from calque.console import table
from calque.errors import UsageError
from calque.validation import across
from calque.validation.drive import ModelIO
from calque.validation.reference import read_references
from calque.validation.report import Report

EXACT = "without rounded activations"


def compare(
    folders: Sequence[Path], threads: int = 0, record: bool = False, announce: Callable[[str], object] = lambda stage: None
) -> dict[str, Any]:
    """Return ``artifacts``, ``scenarios``, ``integers`` and ``answers`` of each two; with ``record`` each report.json holds it too.

    Artifacts that round activations are compared a second time without that, where their target can run them so: runtimes round
    in ways of their own, and what is left is how they multiply.

    Raises:
        UsageError: fewer than two artifacts, or not all of one model.
        ArtifactUnreadable: one is no artifact, or damaged.
        TargetUnavailable: the runtime of one is not here.
    """
    artifacts = _named([Artifact.read(Path(folder)) for folder in folders])
    made = {name: targets.make(artifact.target, artifact.recipe.get("options", {})) for name, artifact in artifacts.items()}
    announce("files")
    for artifact in artifacts.values():
        artifact.require_whole()
    announce("integers")
    integers: list[dict[str, Any]] = []
    for alike in _by_form(artifacts):
        integers += across.integers_apart({name: _integers(made[name], artifacts[name]) for name in alike})
    shared = across.shared_scenarios({name: read_references(artifact.folder) for name, artifact in artifacts.items()})
    if not shared:
        raise UsageError("the artifacts were proved by no scenario in common", fix="convert them with the same scenarios and max_length")
    said: dict[str, Any] = {}
    exact: dict[str, Any] = {}
    scenarios = [scenario for scenario, _ in shared.values()]
    for name, artifact in artifacts.items():
        announce(name)
        said[name] = across.answers(made[name].open(artifact, threads), ModelIO.of(artifact), scenarios)
        if session := targets.exact(made[name], artifact, threads):
            exact[name] = across.answers(session, ModelIO.of(artifact, exact=True), scenarios)
    sigmas = across.sigmas_of(shared)
    answers = [{**row, "rounded": True} for row in across.apart(said, sigmas)]
    if exact:
        answers += [{**row, "rounded": False} for row in across.apart({**said, **exact}, sigmas)]
    facts = [
        {"name": name, "target": artifact.target, "precision": artifact.precision, "rounds_activations": rounds_activations(artifact)}
        for name, artifact in artifacts.items()
    ]
    found = {"artifacts": facts, "scenarios": sorted(shared), "integers": integers, "answers": answers}
    if record:
        for artifact in artifacts.values():
            replace(Report.read(artifact.folder), across=found).write(artifact.folder)
    return found


def _named(artifacts: Sequence[Artifact]) -> dict[str, Artifact]:
    """Return the artifacts by target and precision, or by folder where two have both in common.

    Raises:
        UsageError: fewer than two, or of several models.
    """
    if len(artifacts) < 2:
        raise UsageError("one artifact has nothing beside it", fix="name two folders or more")
    sources = {str(artifact.source.get("sha256")): f"{artifact.folder}  {artifact.source.get('id')}" for artifact in artifacts}
    if len(sources) > 1:
        raise UsageError("the artifacts are of several models", list(sources.values()), "name artifacts of one model")
    if len({artifact.folder.resolve() for artifact in artifacts}) < len(artifacts):
        raise UsageError("an artifact is named twice", fix="name each once")
    names = [f"{artifact.target} {artifact.precision}" for artifact in artifacts]
    if len(set(names)) < len(names):
        names = [str(artifact.folder) for artifact in artifacts]
    return dict(zip(names, artifacts, strict=True))


def _by_form(artifacts: Mapping[str, Artifact]) -> list[list[str]]:
    """Return the names of artifacts with integers, those together that should hold the same: 8 bits are not held against 4."""
    groups: dict[str, list[str]] = {}
    for name, artifact in artifacts.items():
        if artifact.passes.get("quantize_weights"):
            groups.setdefault(str(QUANTIZED[artifact.precision]), []).append(name)
    return list(groups.values())


def _integers(target: targets.Target, artifact: Artifact) -> across.Matrices:
    return target.integers(artifact) if isinstance(target, targets.HoldsIntegers) else {}


def groups(artifacts: Sequence[Artifact]) -> list[list[Path]]:
    """Return the folders of artifacts of one model in one precision for several targets, group by group."""
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for artifact in artifacts:
        found.setdefault((str(artifact.source.get("sha256")), artifact.precision), {})[artifact.target] = artifact.folder
    return [list(folders.values()) for folders in found.values() if len(folders) > 1]


def text(found: Mapping[str, Any]) -> str:
    """Return what was compared as two tables."""
    parts = []
    if found["integers"]:
        rows = [
            (row["artifact"], row["matrices"], row["rows"], row["rows_apart"] or "none", row["scales"] + _dtype(row))
            for row in found["integers"]
        ]
        parts.append(table(("integers of", "matrices", "rows", "rows apart", "scales"), rows))
    for rounded in dict.fromkeys(row["rounded"] for row in found["answers"]):
        rows = [
            (*row["artifacts"], row["positions"], _sigma(row), "–" if row["top1"] is None else f"{row['top1']:.4f}")
            for row in found["answers"]
            if row["rounded"] == rounded
        ]
        head = "artifact" if rounded else EXACT
        parts.append(table((head, "beside", "positions", "worst |Δ|/σ", "top-1"), rows))
    return "\n\n".join(parts)


def _dtype(row: Mapping[str, Any]) -> str:
    return f" ({row['scale_dtype']})" if row["scale_dtype"] else ""


def faults(found: Mapping[str, Any]) -> list[str]:
    """Return a line for all that must not be: integers that are not the same, answers that are no numbers."""
    return [*across.differing(found["integers"]), *across.not_finite(found["answers"])]


def _sigma(row: Mapping[str, Any]) -> str:
    return "–" if not row["positions"] else "not finite" if row["worst_sigma"] is None else f"{row['worst_sigma']:.1e}"
