"""Every fault that a conversion is put through, and what must come of it; the tests and docs/faults.md read this one list."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGALRM, SIGKILL

from calque.artifact import Artifact
from calque.errors import CalqueError
from calque.staging import staging
from tests.calque.artifact_folder import content, write_artifact
from tests.faults.hostile_inputs import CANARY, MODELS
from tests.faults.planted import STAGES
from tests.faults.workshop import Job, Outcome, Workshop, names

MB = 1 << 20
NEEDS_DISK = "a tmpfs cannot be mounted here"


@dataclass(frozen=True)
class Case:
    """A fault and what must come of it.

    ``codes``: the exit codes that are right. ``says``: a pattern of the error. ``leaves``: what lies in the output's folder then;
    None: the older artifact alone. ``quick`` ones run by default. ``disk``: the output lies on a disk of its own.
    """

    name: str
    fault: str = ""
    stage: str = ""
    amount: float = 0
    codes: tuple[int, ...] = (1,)
    says: str = ""
    leaves: tuple[str, ...] | None = None
    older: bool = True
    disagree: bool = False
    disk: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a case: how the process ended, what lay beside the model then, and everything that was wrong."""

    outcome: Outcome
    left: tuple[str, ...]
    kept: str
    faults: tuple[str, ...]


REFUSED = r"\A(\w+): .+"
NEW = ("out",)


def _signals() -> Iterator[Case]:
    quick = {("SIGKILL", "emit"), ("SIGKILL", "publishing"), ("SIGTERM", "trace"), ("SIGTERM", "bisect"), ("SIGINT", "source"),
             ("SIGINT", "lower"), ("SIGINT", "publishing")}  # fmt: skip
    for fault, codes, says in (
        ("SIGKILL", (-SIGKILL,), r"\A\Z"),
        ("SIGTERM", (130,), r"\Ainterrupted\Z"),
        ("SIGINT", (130,), r"\Ainterrupted\Z"),
    ):
        for stage in STAGES:
            yield Case(f"{fault} at {stage}", fault, stage, codes=codes, says=says, quick=(fault, stage) in quick)


def _at_stages() -> Iterator[Case]:
    gone = r"(was removed|was replaced) while it was written"
    full = r"memory ran out|a file in .* may not grow|the disk that holds .* is full|\w+ needs .* on disk"
    fits = (rf"\A(WontFit: ({full})|\Z|ParityFailed)", (0, 3, 6))
    last = ("prove", "publishing")
    small = ("prove", "bisect", "publishing")  # what is still to be written fits in what the scratch folder gives back
    quick = {("limit_memory", "trace"), ("limit_file_size", "emit"), ("limit_file_size", "reference"), ("fill_disk", "emit"),
             ("make_disk_read_only", "emit"), ("remove_staged", "emit"), ("replace_staged_by_a_file", "publishing"),
             ("remove_parent", "prove"), ("remove_model", "trace"), ("truncate_weights", "reference")}  # fmt: skip
    for stage in STAGES:
        cases = [
            Case("memory", "limit_memory", amount=2 * MB, codes=fits[1], says=fits[0]),
            Case("limit of file sizes", "limit_file_size", amount=4096, codes=fits[1] if stage == "publishing" else (6,), says=fits[0]),
            Case("disk full", "fill_disk", amount=4096, codes=fits[1] if stage in small else (6,), says=fits[0], disk=True),
            Case("disk turned read-only", "make_disk_read_only", codes=(2,), says="Read-only file system", disk=True),
            Case("unfinished folder removed", "remove_staged", says=gone),
            Case("unfinished folder replaced by a file", "replace_staged_by_a_file", says=gone),
            Case("folder of the output removed", "remove_parent", says=gone, leaves=()),
            Case("model removed", "remove_model", codes=(0, 3) if stage in last else (7,), says=rf"\ASourceUnreadable|{fits[0]}"),
            Case("weights cut short", "truncate_weights", codes=(0, 3) if stage in last else (7,), says=rf"\ASourceUnreadable|{fits[0]}"),
        ]
        for case in cases:
            yield replace(case, name=f"{case.name} at {stage}", stage=stage, quick=(case.fault, stage) in quick)


def _in_the_way() -> Iterator[Case]:
    for stage in ("source", "prove", "publishing"):
        quick = stage == "prove"
        yield Case(f"folder of someone appears at {stage}", "put_a_folder_in_the_way", stage, codes=(2,), says="is not an artifact",
                   older=False, leaves=("out",), quick=quick)  # fmt: skip
        yield Case(f"file of someone appears at {stage}", "put_a_file_in_the_way", stage, codes=(2,), says="is not an artifact",
                   older=False, leaves=("out",))  # fmt: skip
        yield Case(f"older artifact removed at {stage}", "remove_older", stage, codes=(0,), leaves=NEW, says=r"\A\Z")
    yield Case("numbers disagree", disagree=True, codes=(3,), says=r"\AParityFailed", leaves=("out", "out.rejected"))


# Read by the code that the others of their kind meet; tests of that code alone have more of each.
ALIKE = {
    "config: no heads", "config: size beyond int64", "config: NaN for an epsilon", "config: text for a size", "config: no size",
    "config: unknown activation", "config: empty", "config: a number of 10^5 digits", "weights: header cut short", "weights: empty",
    "weights: a bit of the header flipped", "weights: negative offsets", "weights: NaN in a shape", "hub: cached commit is gone",
    "hub: a file in place of the snapshots", "hub: weights cut short", "recipe: nested without end", "recipe: binary",
    "recipe: a number of 10^5 digits", "recipe: NaN for a count", "recipe: a folder", "recipe: absent",
}  # fmt: skip


def _inputs() -> Iterator[Case]:
    for name, (_, code, says) in MODELS.items():
        quick = code != 0 and name not in ALIKE
        yield Case(name, codes=(code,), says=says or (REFUSED if code else r"\A\Z"), quick=quick, older=False, leaves=() if code else NEW)


CASES = {case.name: case for case in (*_signals(), *_at_stages(), *_in_the_way(), *_inputs())}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Have a disk of 64 MB at the folder; gives False where this process may not mount one."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], capture_output=True, check=False)
    try:
        yield mount.returncode == 0
    finally:
        while mount.returncode == 0 and os.path.ismount(folder):  # a fault may have mounted it once more
            subprocess.run(["umount", "-l", str(folder)], check=True)


def run_case(workshop: Workshop, case: Case, pristine: Path, folder: Path) -> Result | None:
    """Return what came of the case, in an empty folder; None where it needs a disk and cannot have one."""
    model, out = Path(shutil.copytree(pristine, folder / "model")), folder / "outputs" / "out"
    named = MODELS[case.name][0](model) if case.name in MODELS else [str(model)]
    out.parent.mkdir()
    with small_disk(out.parent) if case.disk else contextlib.nullcontext(True) as mounted:
        if not mounted:
            return None
        if case.older:
            write_artifact(out, "old")
        arguments = ("--target", "onnxruntime", *named, "-o", str(out), "--force")
        outcome = workshop.run(Job(arguments, out, model, case.fault, case.stage, case.amount, case.disagree))
        left = tuple(name for name in names(out.parent) if name != "filler")
        kept = _kept(out)
        faults = [*_faults_of_the_end(case, outcome), *_faults_on_disk(case, outcome, left, kept)]
        if (folder / CANARY).exists():
            faults.append("code of the model ran")
        if case.fault != "make_disk_read_only":
            faults += _faults_of_the_next_run(out, left)
    return Result(outcome, left, kept, tuple(faults))


def _kept(out: Path) -> str:
    """Return what the output is, in words."""
    if not out.exists():
        return "absent"
    if out.is_file() or (out / "precious").exists():
        return "someone's, untouched"
    if (out / "config.json").exists():
        try:
            return "new artifact, " + ("damaged" if Artifact.read(out).damaged_files() else "whole")
        except CalqueError:
            return "damaged"
    return "older artifact" if content(out) == "old" else "damaged"


def _faults_of_the_end(case: Case, outcome: Outcome) -> list[str]:
    faults = []
    if outcome.code not in case.codes or outcome.code == -SIGALRM:
        faults.append(f"exit code {outcome.code}, not {' or '.join(map(str, case.codes))}: {outcome.errors}")
    if not re.search(case.says, outcome.errors.strip()):
        faults.append(f"it does not say {case.says}: {outcome.errors}")
    if "Traceback" in outcome.errors or "internal error" in outcome.errors:
        faults.append(f"it is no clear error: {outcome.errors}")
    if len(outcome.errors) > 10_000:
        faults.append(f"the error is {len(outcome.errors)} characters long")
    headlines = [line for line in outcome.errors.splitlines() if re.match(r"[A-Z]\w+: |Fix: ", line) and not line.startswith("Fix: ")]
    if len(headlines) > 1:
        faults.append(f"it gives several errors: {headlines}")
    return faults


def _faults_on_disk(case: Case, outcome: Outcome, left: tuple[str, ...], kept: str) -> list[str]:
    faults = []
    ours = tuple(name for name in left if ".calque-" in name)
    if ours and outcome.code != -SIGKILL and case.fault != "make_disk_read_only":
        faults.append(f"it left {ours}")
    expected = case.leaves if case.leaves is not None else ("out",)
    if case.stage == "bisect" and outcome.code == 3:
        expected = (*expected, "out.rejected")
    if outcome.code == 0:
        expected = NEW
    if tuple(name for name in left if name not in ours) != expected:
        faults.append(f"there lie {left}, not {expected}")
    right = {"older artifact"} if case.older and expected else {"absent", "someone's, untouched"}
    right = {"new artifact, whole"} if outcome.code == 0 else right
    if kept not in right:
        faults.append(f"the output is: {kept}")
    return faults


def _faults_of_the_next_run(out: Path, left: tuple[str, ...]) -> list[str]:
    """Return what the next conversion into the same folder leaves of this one, as it begins."""
    with contextlib.suppress(CalqueError, ZeroDivisionError), staging(out, force=True):
        raise ZeroDivisionError
    remaining = [name for name in names(out.parent) if ".calque-" in name]
    return [f"after the next run there lie {remaining}"] if remaining else []
