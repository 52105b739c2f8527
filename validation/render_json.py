"""A report as one JSON object: for each artifact its verdict, its manifest and its report."""

from __future__ import annotations

import json
from collections.abc import Sequence

from calque.validation.cells import Cell

SCHEMA = 1


def render(cells: Sequence[Cell]) -> str:
    """Return ``{schema, artifacts: [{name, folder, status, error, seconds, worst_sigma, manifest, report}]}``."""
    return json.dumps({"schema": SCHEMA, "artifacts": [cell.data() for cell in cells]}, indent=1, ensure_ascii=False) + "\n"
