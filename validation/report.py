"""report.json: what was measured while converting and proving; everything that may differ between equal conversions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calque.artifact import REPORT
from calque.errors import ArtifactUnreadable
from calque.stages import Stage

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """The measurements of one conversion: rows of the parity gate, stages, and the bytes of each file."""

    scenarios: tuple[Mapping[str, Any], ...] = ()
    stages: tuple[Stage, ...] = ()
    sizes: Mapping[str, int] | None = None

    @classmethod
    def of(cls, folder: Path, scenarios: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> Report:
        """Return the report of the artifact in ``folder``, its files measured now."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != REPORT)
        return cls(tuple(scenarios), tuple(stages), {path.relative_to(folder).as_posix(): path.stat().st_size for path in files})

    def write(self, folder: Path) -> None:
        """``folder/report.json`` holds this report."""
        data = {
            "schema": SCHEMA,
            "scenarios": [dict(row) for row in self.scenarios],
            "stages": [asdict(stage) for stage in self.stages],
            "sizes": dict(self.sizes or {}),
        }
        (folder / REPORT).write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Return the report in ``folder``.

        Raises:
            ArtifactUnreadable: there is none, or it does not follow the schema.
        """
        path = folder / REPORT
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ArtifactUnreadable(f"{path} has schema {data['schema']}, this Calque reads {SCHEMA}", fix="upgrade calque")
            return cls(tuple(data["scenarios"]), tuple(Stage(**row) for row in data["stages"]), data["sizes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactUnreadable(f"{path} cannot be read: {error}", fix="convert the model again") from error
