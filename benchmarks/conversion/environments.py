"""Virtual environments of the peers: one each, for their requirements exclude one another; every version is pinned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# What decides how a conversion goes; the rest of an environment is in the requirement files beside this one.
REPORTED = (
    "calque",
    "optimum-onnx",
    "optimum",
    "onnxruntime-genai",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "safetensors",
)

_ASK = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def ensure(peer: str, work: Path) -> Path:
    """Return the interpreter of the peer's environment, which holds exactly the pinned versions; made if it is not there."""
    requirements = Path(__file__).with_name(f"{peer}.txt")
    folder = work / f"env-{peer}"
    python, stamp = folder / "bin" / "python", folder / "requirements.installed"
    wanted = requirements.read_text(encoding="utf-8")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"environment of {peer}: installing into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", str(requirements)]
        subprocess.run(install, check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the interpreter and of the packages that matter, as the interpreter itself finds them."""
    # In isolated mode: of what is installed, not of a checkout in the current folder.
    answer = subprocess.run([python, "-I", "-c", _ASK, *REPORTED], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found
