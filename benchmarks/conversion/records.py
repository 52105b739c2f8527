"""One conversion as a record, and Calque's divided into the conversion alone and its proof, which no peer makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.conversion.measure import Measured

# Stages of Calque's report.json that compare the artifact with the eager model; bisect only where the comparison failed.
PROOF = ("quality", "promote", "reference", "prove", "bisect", "quality of the artifact")
# Where the artifact keeps what eager answered, so that it can be validated elsewhere.
REFERENCE = "reference"


@dataclass(frozen=True)
class Cost:
    """What something took; None where it is not known."""

    wall_s: float
    cpu_s: float | None
    peak_rss_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Record:
    """One run of one tool. ``alone`` and ``proof`` are Calque's two parts, ``stages`` its own measurements.

    ``message`` is the last that a tool said which failed.
    """

    tool: str
    exit_code: int
    whole: Cost
    others_cpu_s: float
    alone: Cost | None = None
    proof: Cost | None = None
    stages: tuple[dict[str, Any], ...] = ()
    message: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the record for results.json, without what it does not have."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def record(tool: str, measured: Measured, out: Path, log: Path, hidden: Mapping[Path, str]) -> Record:
    """Return the record of a conversion that ended, divided where a report of Calque's lies in its output.

    Of one that failed it keeps the last line of its log, in which names stand for the ``hidden`` folders of this machine.
    """
    whole = Cost(measured.wall_s, measured.cpu_s, measured.peak_rss_bytes, size(out))
    stages = read_stages(out)
    alone, proof = divide(measured, stages, whole.output_bytes, size(out / REFERENCE)) if stages else (None, None)
    message = last_line(log, hidden) if measured.exit_code else None
    return Record(tool, measured.exit_code, whole, measured.others_cpu_s, alone, proof, tuple(stages), message)


def last_line(log: Path, hidden: Mapping[Path, str]) -> str:
    """Return the last line of the log that says something, in which names stand for the ``hidden`` folders of this machine."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1] if lines else "nothing was said"
    for folder, name in hidden.items():
        said = said.replace(str(folder), name)
    return said


def size(folder: Path) -> int:
    """Return the bytes of every file in the folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_stages(out: Path) -> list[dict[str, Any]]:
    """Return the stages of Calque's report in the folder; none where there is no report."""
    report = out / "report.json"
    if not report.is_file():
        return []
    stages: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["stages"]
    return stages


def stage_peaks(stages: list[dict[str, Any]]) -> dict[str, int]:
    """Return the peak memory of the conversion's own stages, and of its proof."""
    own, proof = _apart(stages)
    return {"convert": _peak(own), "prove": _peak(proof)}


def divide(measured: Measured, stages: list[dict[str, Any]], whole_bytes: int, proof_bytes: int) -> tuple[Cost, Cost]:
    """Return the conversion alone and the proof.

    The conversion alone keeps all that is not the proof: its own stages, the start of the process and imports, and, at the end,
    digests and writing to disk. Its memory is that of its own stages.
    """
    own, proof_stages = _apart(stages)
    seconds = sum(stage["seconds"] for stage in proof_stages)
    cpu = None
    if measured.marked_at is not None:
        cpu = measured.cpu_at(measured.marked_at + seconds) - measured.cpu_at(measured.marked_at)
    proof = Cost(seconds, cpu, _peak(proof_stages), proof_bytes)
    rest = None if cpu is None else measured.cpu_s - cpu
    return Cost(measured.wall_s - seconds, rest, _peak(own), whole_bytes - proof_bytes), proof


def _apart(stages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the conversion's own stages, and those of its proof."""
    return [stage for stage in stages if stage["name"] not in PROOF], [stage for stage in stages if stage["name"] in PROOF]


def _peak(stages: list[dict[str, Any]]) -> int:
    return max((stage["peak_rss_bytes"] for stage in stages), default=0)
