"""Kills real conversions at random moments and writes what came of each to docs/faults.md.

    python -m tests.faults.kill_sweep --kills 50

Signals take turns, models too, and half of the conversions replace an older artifact. The moment is uniform over the time
that a conversion of that model takes here when nobody disturbs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calque.artifact import Artifact
from calque.errors import CalqueError
from calque.runtime.session import load
from calque.staging import staging
from tests.faults.page import write_section
from tests.faults.workshop import ROOT, arguments_for, names

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HEADER = (
    "", "model", "signal", "after", "of", "stage", "over", "exit", "said", "output folder then", "left beside it", "after the next run",
)  # fmt: skip


@dataclass
class Model:
    """What is converted, how long the last whole conversion of it took in seconds, and an artifact of it."""

    name: str
    argument: str
    seconds: float
    artifact: Path


@dataclass(frozen=True)
class Kill:
    """One conversion that was killed, and everything that could be seen of it afterwards."""

    row: tuple[str, ...]
    faults: tuple[str, ...]


class Planned(Exception):
    """Ends the run that comes after a kill, once it has cleared up."""


def start(argument: str, out: Path, errors: Path) -> subprocess.Popen[bytes]:
    """Return the command, begun."""
    # The installed script, as people run it: under `python -m` Python itself may turn an exit code of 130 into SIGINT.
    command = [sys.executable, str(Path(sys.executable).with_name("calque")), "convert", *arguments_for(argument, out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with errors.open("wb") as file:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, cwd=ROOT, env=environment)


def measure(name: str, argument: str, folder: Path) -> Model:
    """Return the model with an artifact of it, and the seconds that making that took."""
    out, errors = folder / name / "artifact", folder / f"{name}.txt"
    begun = time.monotonic()
    code = start(argument, out, errors).wait()
    assert code == 0, errors.read_text()
    return Model(name, argument, time.monotonic() - begun, out)


def kill(number: int, model: Model, sent: signal.Signals, older: bool, moment: float, folder: Path) -> Kill:
    """Return what came of one conversion that got the signal after ``moment`` of its usual time."""
    out, errors = folder / "out", folder / "stderr.txt"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if older:
        shutil.copytree(model.artifact, out)
    before = (out / "manifest.json").stat().st_ino if older else 0
    usual, begun = model.seconds, time.monotonic()
    process = start(model.argument, out, errors)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment * usual)
        model.seconds = time.monotonic() - begun  # it was quicker than the kill: the machine has less to do than it had
    process.send_signal(sent)
    code = process.wait(60)
    said = [line for line in errors.read_text().splitlines() if line]
    stages = [line.split("] ")[1].split()[0] for line in said if line.startswith("[") and line.endswith("…")]
    messages = [line for line in said if not (line.startswith("[") and line.endswith("…"))]
    state, faults = look_at(out, before, code)
    faults += judge(code, sent, messages, names(folder))
    beside = [name for name in names(folder) if name not in ("out", "stderr.txt")]
    clear_up(out)
    remaining = [name for name in names(folder) if name not in ("out", "stderr.txt")]
    if remaining:
        faults.append(f"the next run left {remaining}")
    row = (
        str(number), model.name, sent.name, f"{moment * usual:.1f} s", f"{usual:.1f} s", stages[-1] if stages else "start",
        "older" if older else "nothing", str(code), " ".join(messages)[:60] or "–", state,
        ", ".join(sorted({name.split("calque-")[-1].split("-")[0] for name in beside})) or "nothing",
        "nothing" if not remaining else str(remaining),
    )  # fmt: skip
    return Kill(row, tuple(f"kill {number}: {fault}" for fault in faults))


def look_at(out: Path, before: int, code: int) -> tuple[str, list[str]]:
    """Return what the output folder is, in words, and what is wrong with it; ``before`` is the older manifest's inode."""
    if not out.exists():
        return "absent", ["the older artifact is gone"] if before else []
    try:
        damaged = Artifact.read(out).damaged_files()
        load(out)
    except CalqueError as error:
        return "damaged", [f"the artifact does not load: {error}"]
    age = "older" if (out / "manifest.json").stat().st_ino == before else "new"
    faults = [f"damaged: {damaged}"] if damaged else []
    if code == 0 and age == "older":
        faults.append("it ended with 0 and wrote nothing")
    return f"{age} artifact, whole", faults


def judge(code: int, sent: signal.Signals, messages: list[str], left: Sequence[str]) -> list[str]:
    """Return what is wrong with how the process ended."""
    faults = []
    # A handler needs an interpreter: before there is one, and when all is over, the system ends the process.
    allowed = {0, -sent} if sent == signal.SIGKILL else {0, 130, -sent}
    if code not in allowed:
        faults.append(f"it ended with {code}: {messages}")
    text = "\n".join(messages)
    if "Traceback" in text and "calque" in text:
        faults.append(f"it showed a traceback: {text}")
    if code == 130 and [name for name in left if "calque-" in name]:
        faults.append(f"interrupted, it left {left}")
    return faults


def clear_up(out: Path) -> None:
    """Do what the next conversion into the folder does first."""
    with contextlib.suppress(Planned), staging(out, force=True):
        raise Planned


def sweep(kills: int, seed: int) -> list[Kill]:
    """Return what came of that many kills."""
    # A shell makes what it starts in the background ignore Ctrl-C, and what that starts inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance = random.Random(seed)
    done = []
    with tempfile.TemporaryDirectory(prefix="calque-kills-") as scratch:
        folder = Path(scratch)
        from tests.tiny_models import TYPES, save_random

        tiny = save_random(TYPES["llama"], folder / "llama")
        models = [measure("builtin:quill", "builtin:quill", folder), measure("tiny llama", str(tiny), folder)]
        for number in range(kills):
            # Each third of the kills has each model over nothing and over an older artifact.
            sent, model, older = SIGNALS[number % 3], models[number % 2], number // 2 % 2 == 1
            done.append(kill(number + 1, model, sent, older, chance.random(), folder / "run"))
            print(" | ".join(done[-1].row), *done[-1].faults, sep="\n  ", flush=True)
    return done


def main() -> int:
    """Sweep, write the table, and return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="leave docs/faults.md as it is")
    args = parser.parse_args()
    done = sweep(args.kills, args.seed)
    faults = [fault for one in done for fault in one.faults]
    if not args.dry:
        write_section("kills", HEADER, [one.row for one in done], f"{args.kills} kills, seed {args.seed}; {len(faults)} faults.")
    print(f"{len(done)} kills, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
