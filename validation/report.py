"""report.json: what was measured while converting and proving; everything that may differ between equal conversions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from calque.artifact import REPORT, read_object
from calque.errors import ArtifactUnreadable
from calque.stages import Stage

SCHEMA = 1
# Lists of the file that are tuples here.
LISTS = ("scenarios", "passes", "weights", "layers", "failures", "notes")


@dataclass(frozen=True)
class Report:
    """The findings of one conversion; what was not found out is empty.

    ``scenarios``: rows of the parity gate. ``sizes``: bytes by file. ``source``: id, revision, sha256, model_type, task,
    parameters, dtype. ``passes``: ``{name, count, skipped: [[place, reason]]}``. ``weights``: ``{name, layer, bytes,
    parameters}`` by layer. ``layers``: ``{layer, kind, worst_sigma, limit, scenario}``. ``failures``: what the proof found,
    first stage and layer first. ``quality``: text, limits, a row for the weights alone and one for the artifact, each layer's
    sensitivity, and what was promoted. ``build``: what the runtime's builder made, in how long and in how much memory, and how
    fast it is where it ran. ``choice``: the target that was picked, and what was measured of each candidate.
    ``across``: integers and answers beside those of other targets. ``notes``: sentences that the user should know.
    """

    scenarios: tuple[Mapping[str, Any], ...] = ()
    stages: tuple[Stage, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    precision: str = ""
    limits: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[Mapping[str, Any], ...] = ()
    layers: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[str, ...] = ()
    quality: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    across: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def measured(self, folder: Path, stages: Sequence[Stage]) -> Report:
        """Return this report with the stages, and with the files of ``folder`` measured now."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != REPORT)
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        return replace(self, stages=tuple(stages), sizes=sizes)

    def noted(self, *sentences: str) -> Report:
        """Return this report with the sentences added to its notes, empty ones left out."""
        return replace(self, notes=(*self.notes, *filter(None, sentences)))

    def data(self) -> dict[str, Any]:
        """Return what report.json holds."""
        return {"schema": SCHEMA, **asdict(self)}

    def write(self, folder: Path) -> None:
        """``folder/report.json`` holds this report."""
        (folder / REPORT).write_text(json.dumps(self.data(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Return the report in ``folder``.

        Raises:
            ArtifactUnreadable: there is none, or it does not follow the schema.
        """
        path = folder / REPORT
        data = read_object(path)
        if (schema := data.pop("schema")) != SCHEMA:
            raise ArtifactUnreadable(f"{path} has schema {schema}, this Calque reads {SCHEMA}", fix="upgrade calque")
        if missing := sorted({"scenarios", "stages", "sizes"} - data.keys()):
            raise ArtifactUnreadable(f"{path} cannot be read: it lacks {', '.join(missing)}", fix="convert the model again")
        try:
            stages = tuple(Stage(**row) for row in data.pop("stages"))
            fields: dict[str, Any] = {key: tuple(value) if key in LISTS else value for key, value in data.items()}
            return cls(stages=stages, **fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise ArtifactUnreadable(f"{path} cannot be read: {error}", fix="convert the model again") from error
