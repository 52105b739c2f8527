"""Virtual environments of the peers: one each, for their requirements exclude one another; every version is pinned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A source distribution that is compiled into an environment and stays beside it, and what cmake is told."""

    name: str
    version: str
    cmake: str

    @property
    def folder(self) -> Path:
        """Return where it is unpacked, within the environment."""
        return Path("source", f"{self.name.replace('-', '_')}-{self.version}")


# llama.cpp for the processor it runs on; its converter is in the source alone.
SOURCES = {"llamacpp": Source("llama-cpp-python", "0.3.36", "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF")}

# What decides how a conversion goes; the rest of an environment is in the requirement files beside this one.
REPORTED = (
    "calque",
    "tensorrt-rtx",
    "optimum-onnx",
    "optimum",
    "onnxruntime-genai",
    "optimum-intel",
    "openvino",
    "nncf",
    "llama-cpp-python",
    "mobius-onnx",
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
    source = SOURCES.get(peer)
    wanted = requirements.read_text(encoding="utf-8") + (f"# {source}\n" if source else "")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"environment of {peer}: installing into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # Every file names all that its environment holds; what a package asks for beyond that is left out on purpose.
        _pip(python, "install", "--no-deps", "--requirement", str(requirements))
        if source:
            _compile(source, folder, python)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def _compile(source: Source, folder: Path, python: Path) -> None:
    """The environment has the package, compiled with all processors from the source that lies beside it."""
    here = (folder / source.folder).parent
    _pip(python, "download", "--no-deps", "--no-binary", source.name, "--dest", str(here), f"{source.name}=={source.version}")
    with tarfile.open(here / f"{source.folder.name}.tar.gz") as archive:
        archive.extractall(here, filter="data")
    print(f"compiling {source.name} {source.version}", file=sys.stderr)
    told = {"CMAKE_ARGS": source.cmake, "CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0)))}
    _pip(python, "install", "--no-deps", "--force-reinstall", str(folder / source.folder), **told)


def _pip(python: Path, action: str, *arguments: str, **told: str) -> None:
    command = [str(python), "-m", "pip", action, "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **told})


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the interpreter and of the packages that matter, as the interpreter itself finds them."""
    # In isolated mode: of what is installed, not of a checkout in the current folder.
    answer = subprocess.run([python, "-I", "-c", _ASK, *REPORTED], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found
