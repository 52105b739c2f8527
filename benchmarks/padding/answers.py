"""Answers with OpenVINO: ``python -m benchmarks.padding.answers FOLDER FILE``, from the repository root, in its environment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.padding.case import SIDES
from benchmarks.padding.models import Stateful, drive

if __name__ == "__main__":
    found = {side: drive(Stateful(Path(sys.argv[1])), side) for side in SIDES}
    np.savez(sys.argv[2], **{f"{side}{row}": logits for side, rows in found.items() for row, logits in enumerate(rows)})
