"""Environments of other tools, made once from the package index into build/ecosystem, and programs run in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parents[2] / "build" / "ecosystem"

GENAI = ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "numpy==2.4.6", "flatbuffers", "protobuf", "packaging")
# optimum-onnx 0.1.0, the newest, needs transformers below 4.58; torch and the rest are those of Calque's own environment.
OPTIMUM = ("optimum-onnx==0.1.0", "optimum==2.3.0", "transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2")
TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"


def environment(name: str, packages: tuple[str, ...], beside_ours: bool = False) -> Path:
    """The Python of a virtual environment that holds the packages, and behind them, where asked, those of this one."""
    folder = CACHE / name
    python, done = folder / "bin" / "python", folder / "packages.json"
    wanted = json.dumps([*packages, beside_ours])
    if done.is_file() and done.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
    if beside_ours:
        [site] = folder.glob("lib/python*/site-packages")
        (site / "calque-environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done.write_text(wanted)
    return python


def node_modules() -> Path | None:
    """The folder in which Node finds transformers.js; None where there is no Node or npm."""
    if not (shutil.which("node") and shutil.which("npm")):
        return None
    folder = CACHE / "transformers.js"
    done = folder / "packages.json"
    if not (done.is_file() and done.read_text() == TRANSFORMERS_JS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        # The scripts fetch CUDA libraries; what runs on a CPU is in the packages themselves.
        subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", TRANSFORMERS_JS], cwd=folder, check=True)
        done.write_text(TRANSFORMERS_JS)
    return folder


def run(command: list[str | Path], program: str, question: Any, cwd: Path) -> Any:
    """What the program prints as its last line, JSON, given the question as JSON; it sees no network and none of Calque."""
    told = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, program, json.dumps(question)], cwd=cwd, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def python(executable: Path, program: str, question: Any, cwd: Path) -> Any:
    return run([executable, "-c"], program, question, cwd)


def node(modules: Path, program: str, question: Any) -> Any:
    """The same for a program of JavaScript, run where its modules are."""
    return run(["node", "--input-type=module", "--eval"], program, question, modules)


assert sys.platform != "win32", "the paths above are those of POSIX"
