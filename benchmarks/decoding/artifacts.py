"""The artifacts that decode: each converted once by the tool of its environment, and kept while nothing it comes of has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.conversion.environments import versions
from benchmarks.conversion.shapes import SHAPES
from benchmarks.conversion.tools import CALQUE, Tool, calque, environment, genai, optimum

ROOT = Path(__file__).parents[2]
SETTINGS = ("padding=any", "padding=right", "operators=standard")


def tools(work: Path) -> list[Tool]:
    """Return what makes the artifacts, in the order of the tables; the peers' environments are made."""
    python = Path(sys.executable)
    # The builder's default may give the logits of the last position alone, which is less work than the others do.
    whole = ("--extra_options", "prune_lm_head=false")
    return [*(calque(python, "--set", setting) for setting in SETTINGS), genai(work, *whole), optimum(work)]


def ensure(tool: Tool, shape: str, work: Path) -> Path:
    """Return the folder of the artifact; converted if it is not there, or if something it comes of has changed."""
    folder = work / f"artifact-{shape}-{tool.slug}"
    stamp = folder.with_name(f"{folder.name}.json")
    wanted = origin(tool, shape)
    if folder.is_dir() and stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return folder
    print(f"{shape}, {tool.name}: converting into {folder}", file=sys.stderr, flush=True)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    _convert(tool, work / f"model-{shape}", folder, work)
    stamp.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    return folder


def origin(tool: Tool, shape: str) -> dict[str, Any]:
    """Return all that decides what the artifact is: the checkpoint's config, the command, the versions, and Calque's code."""
    code = {"code": code_digest(ROOT / "calque")} if tool.name.startswith(CALQUE) else {}
    return {"config": SHAPES[shape].config(), "command": tool.shown, "versions": versions(tool.python), **code}


def code_digest(package: Path) -> str:
    """Return the SHA-256 of every Python file of the package, with those in folders that it links to."""
    digest = hashlib.sha256()
    for folder, _, names in sorted(os.walk(package, followlinks=True)):
        for name in sorted(name for name in names if name.endswith(".py")):
            path = Path(folder, name)
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _convert(tool: Tool, model: Path, folder: Path, work: Path) -> None:
    """The artifact is in the folder, what was said meanwhile in a log beside it."""
    variables = environment(work)
    if tool.name.startswith(CALQUE):
        variables["PYTHONPATH"] = str(ROOT)  # this checkout's, whatever is installed
    log = folder.with_name(f"{folder.name}.log")
    with log.open("wb") as output:
        command = tool.command(model, folder, work / "genai-cache")
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, cwd=work)
    if done.returncode:
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]), file=sys.stderr)
    done.check_returncode()
