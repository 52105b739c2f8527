"""An artifact on disk: a folder whose manifest.json says what it is and what was proved. Standard library alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from calque.errors import ArtifactUnreadable, BuildFailed, ParityFailed
from calque.states import StateSpec

SCHEMA = 1
MANIFEST = "manifest.json"
REPORT = "report.json"
# What a builder makes of the artifact. It belongs to a device, and the artifact's own script makes it anew there: no manifest lists it.
ENGINE = "model.plan"
# Weights that several graphs share, where they are in no file of a graph.
SHARED_WEIGHTS = "model.safetensors"

# The optional input that says how many last positions get logits; 0 means all.
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
# The graphs of a generator that has one for calls of a single new token of each row; the other takes every call.
PREFILL, DECODE = "prefill", "decode"
# The input of a model that reads images: float32 [batch_size, channels, height, width].
PIXELS = "pixel_values"

Status = Literal["passed", "failed", "not_run"]
Padding = Literal["any", "right", "none"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: ``shape`` holds ints and dimension names, ``dtype`` is numpy's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One runnable graph; positional runtimes take the inputs in this order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Limits:
    """What the artifact must not be asked to do; its session refuses the rest.

    ``max_length``: true tokens of a row; with padding right, slots of the cache, padding among them. ``recompute_at``: a cache
    begun at or below this many tokens must be recomputed, not continued, once the row grows past it, because the rotary
    frequencies of every earlier key change there (longrope).
    """

    padding: Padding = "any"
    batched_chunk: bool = True
    max_length: int | None = None
    recompute_at: int | None = None


@dataclass(frozen=True)
class Check:
    """One question about the artifact and its answer; ``worst`` is in σ of the output, rounded up to 1, 2 or 5 · 10ⁿ."""

    status: Status
    by: str | None = None
    reason: str | None = None
    worst: float | None = None


NOT_RUN = Check("not_run", reason="not reached")
# The targets whose files say all that is rounded.
AS_WRITTEN = ("tensorrt", "torchscript", "torchscript-lite", "coreml")
# The worst figure of a run that agrees exactly; no smaller one is worth a digit in the manifest.
FLOOR = 1e-9


@dataclass(frozen=True)
class Proof:
    """What was asked of the artifact: right numbers, accepted by the runtime's builder, executed on its device."""

    numerics: Check = NOT_RUN
    build: Check = NOT_RUN
    execution: Check = NOT_RUN
    failures: tuple[str, ...] = ()

    def joined(self, as_it_is: Proof) -> Proof:
        """Return this proof, of numerics without rounded activations, with that of the artifact as it is; a failure of either counts."""
        failed = as_it_is.numerics.status == "failed" and self.numerics.status != "failed"
        numerics = as_it_is.numerics if failed else self.numerics
        return Proof(numerics, as_it_is.build, as_it_is.execution, (*self.failures, *as_it_is.failures))

    def raise_if_failed(self) -> None:
        """Leave quietly unless a check failed.

        Raises:
            ParityFailed: with every failure, first stage and layer first.
            BuildFailed: its numbers are right, and the runtime's builder refuses it.
        """
        failed = [name for name in ("numerics", "build", "execution") if getattr(self, name).status == "failed"]
        fix = "the rejected folder holds the artifact and report.json; nothing was written to the output folder"
        if failed == ["build"]:
            raise BuildFailed(f"{self.build.by} cannot build the artifact", self.failures, fix)
        if failed:
            raise ParityFailed(f"{', '.join(failed)} failed: the artifact does not agree with the eager model", self.failures, fix)


@dataclass(frozen=True)
class Artifact:
    """A folder and everything its manifest says."""

    folder: Path
    target: str
    recipe: Mapping[str, Any]
    source: Mapping[str, Any]
    precision: str
    files: Mapping[str, str]
    graphs: Mapping[str, GraphSpec]
    states: tuple[StateSpec, ...]
    passes: Mapping[str, int]
    tools: Mapping[str, str]
    limits: Limits
    proof: Proof = field(default_factory=Proof)

    def with_proof(self, proof: Proof) -> Artifact:
        """Return the same artifact carrying ``proof``."""
        return replace(self, proof=proof)

    def graph_for(self, new: int) -> str | None:
        """Return the name of the graph that takes calls of so many new tokens of each row; None where no rule says which does."""
        if len(self.graphs) == 1:
            return next(iter(self.graphs))
        if set(self.graphs) != {PREFILL, DECODE}:
            return None
        return DECODE if new == 1 else PREFILL

    def manifest(self) -> dict[str, Any]:
        """Return what manifest.json holds: no time, path, host or measurement, so equal recipes give equal bytes."""
        proof = {name: asdict(getattr(self.proof, name)) for name in ("numerics", "build", "execution")}
        return {
            "schema": SCHEMA,
            "target": self.target,
            "recipe": dict(self.recipe),
            "source": dict(self.source),
            "precision": self.precision,
            "files": dict(sorted(self.files.items())),
            "graphs": {name: asdict(graph) for name, graph in self.graphs.items()},
            "states": [asdict(state) for state in self.states],
            "passes": dict(self.passes),
            "tools": dict(sorted(self.tools.items())),
            "limits": asdict(self.limits),
            "proof": proof,
        }

    def write_manifest(self) -> None:
        """Make manifest.json hold this artifact, synced to disk before it gets its name."""
        partial = self.folder / (MANIFEST + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(self.manifest(), file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.folder / MANIFEST)

    def damaged_files(self) -> list[str]:
        """Return one line for each file that is missing or whose bytes are not those of the manifest."""
        lines = []
        for name, digest in self.files.items():
            path = self.folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                lines.append(f"{name}  lies outside the folder")
            elif not path.is_file():
                lines.append(f"{name}  missing")
            elif file_sha256(path) != digest:
                lines.append(f"{name}  bytes differ from the manifest's sha256")
        return lines

    def require_whole(self) -> None:
        """Leave quietly if every file is there, and as it was written.

        Raises:
            ArtifactUnreadable: a line for each that is not.
        """
        if lines := self.damaged_files():
            raise self.damage(lines)

    def damage(self, lines: list[str]) -> ArtifactUnreadable:
        """Return the error that says which files are damaged."""
        return ArtifactUnreadable(f"{self.folder} is damaged", lines, "copy it again, or convert the model again")

    def config(self) -> dict[str, Any]:
        """Return the model's config, that of its text part where it has several; empty where the folder has none.

        Raises:
            ArtifactUnreadable: it is no JSON object.
        """
        config = read_json(self.folder / "config.json")
        text = config.get("text_config")
        return {**config, **text} if isinstance(text, dict) else config

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Return the artifact in ``folder``, as its manifest describes it.

        Raises:
            ArtifactUnreadable: no folder, no manifest, not JSON, a newer schema, or keys that do not fit the schema.
        """
        path = folder / MANIFEST
        require_folder(folder)
        if not path.is_file():
            raise ArtifactUnreadable(f"{folder} is not an artifact: it has no {MANIFEST}", fix="name a folder that `calque convert` wrote")
        data = read_object(path)
        if data["schema"] != SCHEMA:
            raise ArtifactUnreadable(f"{path} has schema {data['schema']}, this Calque reads {SCHEMA}", fix="upgrade calque")
        try:
            return cls._from_manifest(folder, data)
        except (KeyError, TypeError, AttributeError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ArtifactUnreadable(f"{path} does not follow schema {SCHEMA}: {why}", fix="convert the model again") from error

    @classmethod
    def _from_manifest(cls, folder: Path, data: dict[str, Any]) -> Artifact:
        for name in ("recipe", "source", "files", "graphs", "passes", "tools", "limits", "proof"):
            if not isinstance(data[name], dict):
                raise TypeError(f"{name} is no object")

        def tensors(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)

        numerics, build, execution = (Check(**data["proof"][name]) for name in ("numerics", "build", "execution"))
        graphs = {
            name: GraphSpec(graph["file"], tensors(graph["inputs"]), tensors(graph["outputs"])) for name, graph in data["graphs"].items()
        }
        return cls(
            folder=folder,
            target=data["target"],
            recipe=data["recipe"],
            source=data["source"],
            precision=data["precision"],
            files=data["files"],
            graphs=graphs,
            states=tuple(StateSpec(**{**row, "shape": tuple(row["shape"])}) for row in data["states"]),
            passes=data["passes"],
            tools=data["tools"],
            limits=Limits(**data["limits"]),
            proof=Proof(numerics, build, execution),
        )


def rounds_activations(artifact: Artifact) -> bool:
    """Return whether running the artifact rounds activations to 8 bits: where its file says so, or its runtime does so of itself."""
    if artifact.passes.get("quantize_activations", 0):
        return True
    # ONNX Runtime, and our own kernels in packages of AOTInductor, multiply integers with rounded values unless told not to.
    options = artifact.recipe.get("options", {})
    codes = artifact.passes.get("quantize_weights", 0) > 0
    return codes and artifact.target not in AS_WRITTEN and options.get("activations", "int8") != "float32"


def round_up(value: float) -> float:
    """Return the smallest of 1, 2 and 5 · 10ⁿ that is not below the value, at least 1e-9."""
    value = max(value, FLOOR)
    exponent = math.floor(math.log10(value)) - 1
    # Written as decimal text and read back: 2 · 10⁻⁶ is then the double nearest to 2e-06, however it was reached.
    ladder = [float(f"{digit}e{power}") for power in range(exponent, exponent + 4) for digit in (1, 2, 5)]
    return next(step for step in ladder if step >= value)


def require_folder(folder: Path) -> None:
    """Leave quietly if the folder is there.

    Raises:
        ArtifactUnreadable: nothing of that name, or no folder.
    """
    if not os.path.isdir(folder):
        why = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise ArtifactUnreadable(f"{folder} {why}", fix="name a folder that `calque convert` wrote")


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file of Calque's, which says what schema it follows.

    Raises:
        ArtifactUnreadable: no such file, not JSON, not an object, or without a schema.
    """
    fix = "convert the model again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        raise ArtifactUnreadable(f"{path} cannot be read: {why}", fix=fix) from error
    if not isinstance(data, dict):
        raise ArtifactUnreadable(f"{path} cannot be read: it holds no JSON object", fix=fix)
    if "schema" not in data:
        raise ArtifactUnreadable(f"{path} cannot be read: it does not say what `schema` it follows", fix=fix)
    return data


def unlisted_files(folder: Path, listed: Iterable[str]) -> list[str]:
    """Return the files in an artifact's folder that are neither among those its manifest lists nor those that none lists."""
    known = {*listed, MANIFEST, REPORT, ENGINE}
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return [name for name in found if name not in known]


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of the file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the file's object, an empty one where there is no file.

    Raises:
        ArtifactUnreadable: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactUnreadable(f"{path} cannot be read: {error}", fix="convert the model again") from error
    if not isinstance(data, dict):
        raise ArtifactUnreadable(f"{path} is no JSON object", fix="convert the model again")
    return data
