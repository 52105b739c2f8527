"""What a report is rendered from: one cell an artifact, read from its folder or from the matrix.json of a run over many."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calque.artifact import MANIFEST, Artifact, require_folder
from calque.console import quality_tables, quality_title
from calque.errors import ArtifactUnreadable
from calque.staging import rejected_folder
from calque.validation.report import Report

MATRIX = "matrix.json"
SCHEMA = 1

Status = Literal["passed", "failed", "skipped"]
CHECKS = ("numerics", "build", "execution")


@dataclass(frozen=True)
class Cell:
    """One conversion and what came of it. ``error``: type, what, where, fix and exit_code of one that left no artifact.

    ``manifest`` and ``report`` are empty where there is none; ``seconds`` and ``worst_sigma`` are None where unknown.
    """

    name: str
    folder: Path | None
    status: Status
    error: Mapping[str, Any] | None
    seconds: float | None
    worst_sigma: float | None
    manifest: Mapping[str, Any]
    report: Report

    @property
    def title(self) -> str:
        """The model and what it became; the cell's name where no artifact says it."""
        if not self.manifest:
            return self.name
        return f"{self.manifest['source'].get('id')} → {self.manifest['target']}, {self.manifest['precision']}"

    @property
    def scenarios(self) -> list[Mapping[str, Any]]:
        """The rows of the parity gate, those that failed first."""
        return sorted(self.report.scenarios, key=lambda row: ("failed", "not_run", "passed").index(row["status"]))

    @property
    def limit(self) -> float | None:
        """The limit of the scenario that came nearest to its own."""
        measured = [row for row in self.report.scenarios if row.get("worst_sigma") is not None]
        return max(measured, key=lambda row: row["worst_sigma"] / row["limit"])["limit"] if measured else None

    @property
    def failed_checks(self) -> list[str]:
        """One line for each check of the proof that failed."""
        proof = self.manifest.get("proof", {})
        return [f"{name}: {proof[name]['reason'] or 'failed'}" for name in CHECKS if proof and proof[name]["status"] == "failed"]

    @property
    def findings(self) -> list[str]:
        """What the proof found beyond the reasons of single scenarios: first the stage and layer that diverge first."""
        said = {f"{row['name']}: {row.get('reason')}" for row in self.report.scenarios}
        found = [line for line in self.report.failures if line not in said]
        return found or ([] if said & set(self.report.failures) else self.failed_checks)

    def data(self) -> dict[str, Any]:
        """Return the merged facts as JSON holds them."""
        facts = {"name": self.name, "folder": str(self.folder) if self.folder else None, "status": self.status}
        measured = {"error": dict(self.error) if self.error else None, "seconds": self.seconds, "worst_sigma": self.worst_sigma}
        known = bool(self.manifest)
        return {**facts, **measured, "manifest": dict(self.manifest) if known else None, "report": self.report.data() if known else None}


def read_cells(folders: Iterable[Path]) -> list[Cell]:
    """Return the cells of every folder: an artifact, a rejected one, or a folder that holds matrix.json.

    Raises:
        ArtifactUnreadable: all folders that are not there, are none of these, or do not follow their schema.
    """
    cells: list[Cell] = []
    unreadable = []
    for folder in folders:
        try:
            require_folder(folder)
            cells += _read_matrix(folder) if (folder / MATRIX).is_file() else [read_artifact(folder)]
        except ArtifactUnreadable as error:
            unreadable.append(error)
    if len(unreadable) == 1:
        raise unreadable[0]
    if unreadable:
        raise ArtifactUnreadable("some folders cannot be reported on", [error.what for error in unreadable], unreadable[0].fix)
    return cells


def read_artifact(folder: Path) -> Cell:
    """Return the cell of an artifact, or of a rejected one.

    Raises:
        ArtifactUnreadable: no artifact, or a damaged manifest or report.
    """
    if not (folder / MANIFEST).is_file():
        fix = "name a folder that `calque convert` wrote, one it rejected, or one of several conversions"
        raise ArtifactUnreadable(f"{folder} holds neither {MANIFEST} nor {MATRIX}", fix=fix)
    manifest, report = Artifact.read(folder).manifest(), Report.read(folder)
    _check_rows(folder, report)
    failed = [name for name in CHECKS if manifest["proof"][name]["status"] == "failed"]
    measured = [row["worst_sigma"] for row in report.scenarios if row.get("worst_sigma") is not None]
    status: Status = "failed" if failed else "passed" if manifest["proof"]["numerics"]["status"] == "passed" else "skipped"
    seconds = sum(stage.seconds for stage in report.stages)
    return Cell(folder.resolve().name, folder, status, None, seconds, max(measured, default=None), manifest, report)


def _check_rows(folder: Path, report: Report) -> None:
    for row in report.scenarios:
        if not isinstance(row, dict) or not {"name", "limit"} <= row.keys() or row.get("status") not in ("passed", "failed", "not_run"):
            raise ArtifactUnreadable(f"{folder}: a scenario of the report is not one: {row}", fix="convert the model again")
    try:
        quality_title(report.quality), quality_tables(report.quality)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactUnreadable(f"{folder}: the quality in the report cannot be read: {error}", fix="convert the model again") from error


def _read_matrix(folder: Path) -> Iterator[Cell]:
    path = folder / MATRIX
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ArtifactUnreadable(f"{path} has schema {data['schema']}, this Calque reads {SCHEMA}", fix="upgrade calque")
        cells = [_cell(folder, row) for row in data["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactUnreadable(f"{path} cannot be read: {type(error).__name__}: {error}", fix="run the conversions again") from error
    yield from cells


def _cell(parent: Path, row: Mapping[str, Any]) -> Cell:
    """Return the cell of a row, with its artifact's facts where it left one: its own if it passed, the rejected one if not."""
    status: Status = {"passed": "passed", "failed": "failed", "skipped": "skipped"}[row["status"]]  # type: ignore[assignment]
    error, folder = row.get("error"), parent / row["folder"] if row.get("folder") else None
    # Where a conversion failed, what lies in its folder is an older artifact's.
    if folder and status == "failed" and not folder.name.endswith(".rejected"):
        folder = rejected_folder(folder)
    found: Cell | None = None
    if folder and (folder / MANIFEST).is_file():
        try:
            found = read_artifact(folder)
        except ArtifactUnreadable as damage:
            error, status = error or {"type": type(damage).__name__, "what": damage.what, "where": [], "fix": damage.fix}, "failed"
    elif status == "passed":
        error, status = {"type": "ArtifactUnreadable", "what": f"{folder} is not there", "where": [], "fix": "convert it again"}, "failed"
    if error is not None:
        error = {"type": "", "what": "", "fix": "", "exit_code": row.get("exit_code"), **error, "where": [*(error.get("where") or ())]}
    seconds, worst = row.get("seconds"), row.get("worst_sigma")
    return Cell(
        str(row["name"]),
        folder if found else None,
        status,
        error,
        seconds if seconds is not None or not found else found.seconds,
        worst if worst is not None or not found else found.worst_sigma,
        found.manifest if found else {},
        found.report if found else Report(),
    )


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells, those that failed first."""
    return sorted(cells, key=lambda cell: ("failed", "skipped", "passed").index(cell.status))
