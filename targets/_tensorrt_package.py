"""What a TensorRT artifact carries beside its model: how to build it, scripts that build and run it, and runs of those scripts.

::

    build.json        flags and levels, by name: their integers mean other things in other versions
    profiles.json     the range of every input's shape
    trtexec.txt       the same as command lines
    build_engine.py   needs `tensorrt` or `tensorrt_rtx`, nothing else
    run_engine.py     needs numpy, one of the two, and a GPU; cuda_engine.py is its other half
    images.py         of models that read images: what they were asked
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = ("build_engine.py", "cuda_engine.py", "run_engine.py")
# Images are numbers in the references; the gate's own file, which needs numpy alone, makes them anew.
IMAGES = Path(__file__).parents[1] / "validation" / "images.py"
PIXELS = "pixel_values"
BUILD, PROFILES, TRTEXEC = "build.json", "profiles.json", "trtexec.txt"
# What build_engine.py is told by a flag of the builder, and trtexec by one of its own.
TRTEXEC_FLAGS = {
    "REFIT": "--refit", "STRIP_PLAN": "--stripWeights", "VERSION_COMPATIBLE": "--versionCompatible",
    "EXCLUDE_LEAN_RUNTIME": "--excludeLeanRuntime", "WEIGHT_STREAMING": "--allowWeightStreaming", "SPARSE_WEIGHTS": "--sparsity=enable",
    "GPU_FALLBACK": "--allowGPUFallback", "MONITOR_MEMORY": "--monitorMemory",
}  # fmt: skip
# Runs a script that ends with the process that waits for it: 1 is PR_SET_PDEATHSIG of Linux, 9 the signal that kills.
ALONE = """import ctypes, runpy, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# How often it is looked whether a script has ended.
SECONDS = 0.2
TRTEXEC_LEVELS = {"AMPERE_PLUS": "ampere+", "SAME_COMPUTE_CAPABILITY": "sameComputeCapability"}


def write_package(folder: Path, build: Mapping[str, Any], profiles: Mapping[str, Any]) -> list[str]:
    """``folder`` holds the two descriptions, the scripts and the command line; return the names of what was written.

    The same arguments give the same bytes.
    """
    for name, content in ((BUILD, build), (PROFILES, profiles)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / TRTEXEC).write_text(_trtexec(build, profiles), encoding="utf-8")
    scripts = [Path(__file__).parent / "tensorrt_package" / name for name in SCRIPTS]
    if any(PIXELS in entry["shapes"] for entry in profiles["profiles"]):
        scripts.append(IMAGES)
    for script in scripts:
        shutil.copyfile(script, folder / script.name)
    return sorted([BUILD, PROFILES, TRTEXEC, *(script.name for script in scripts)])


def _trtexec(build: Mapping[str, Any], profiles: Mapping[str, Any]) -> str:
    said = [f"--onnx={build['onnx']}", f"--saveEngine={build['engine']}"]
    entries = profiles["profiles"]
    for number, entry in enumerate(entries):
        said += [f"--profile={number}"] if len(entries) > 1 else []
        said += [f"--{end}Shapes={_shapes(entry['shapes'], end)}" for end in ("min", "opt", "max") if entry["shapes"]]
    said += _settings(build)
    # --stronglyTyped is needed by 10.12 to 10.16 and does nothing from 11 on; TensorRT-RTX's tool is called tensorrt_rtx.
    lines = ["# What build_engine.py does, for trtexec. Versions before 11 take types from the graph only with --stronglyTyped."]
    unsaid = [name for name in build.get("builder_flags", []) if name not in TRTEXEC_FLAGS]
    lines += [f"# trtexec has no word for {name}." for name in unsaid]
    return "\n".join([*lines, "trtexec " + " \\\n  ".join(said)]) + "\n"


def _shapes(shapes: Mapping[str, Mapping[str, Sequence[int]]], end: str) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape[end]))}" for name, shape in shapes.items())


def _settings(build: Mapping[str, Any]) -> Iterator[str]:
    yield f"--builderOptimizationLevel={build.get('builder_optimization_level', 3)}"
    yield f"--profilingVerbosity={build.get('profiling_verbosity', 'DETAILED').lower()}"
    if (level := build.get("hardware_compatibility_level", "NONE")) in TRTEXEC_LEVELS:
        yield f"--hardwareCompatibilityLevel={TRTEXEC_LEVELS[level]}"
    if nbytes := build.get("memory_pool_limits", {}).get("WORKSPACE"):
        yield f"--memPoolSize=workspace:{nbytes}B"
    yield from (TRTEXEC_FLAGS[name] for name in build.get("builder_flags", []) if name in TRTEXEC_FLAGS)
    if "TF32" in build.get("cleared_builder_flags", []):
        yield "--noTF32"
    if "STRONGLY_TYPED" in build.get("network_flags", []):
        yield "--stronglyTyped"


def run_build(folder: Path, sdk: str | None = None, threads: int = 0, engine: Path | None = None) -> dict[str, Any]:
    """Return what the folder's own build_engine.py said of its build; ``error`` and ``problems`` where there is no engine.

    ``sdk``: ``tensorrt`` or ``tensorrt_rtx``, None meaning the first that is here. ``engine``: where the plan goes. The builder
    runs in a process of its own: a crash in it is an answer too.
    """
    arguments = [f"--sdk={sdk}"] if sdk else []
    arguments += [f"--threads={threads}"] if threads else []
    arguments += [f"--engine={engine}"] if engine else []
    return _said(folder / "build_engine.py", arguments)


def run_validation(folder: Path, sdk: str | None = None, engine: Path | None = None) -> dict[str, Any]:
    """Return what the folder's own run_engine.py measured on this machine's GPU; ``error`` where the engine could not be run.

    ``exit_code`` is 3 where numbers are wrong and 5 where there is no SDK or no GPU, as the script's own.
    """
    return _said(folder / "run_engine.py", [*([f"--sdk={sdk}"] if sdk else []), *([f"--engine={engine}"] if engine else [])])


def _said(script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the last line that a script prints, an object, with its exit code."""
    code, stdout, stderr = _run([sys.executable, "-c", ALONE, script.name, *arguments, "--json"], script.parent)
    lines = stdout.strip().splitlines()
    try:
        said = json.loads(lines[-1])
        if not isinstance(said, dict):
            raise ValueError("no object")
    except (ValueError, IndexError):
        what = (
            f"killed by {signal.Signals(-code).name}" if code < 0 else f"{script.name} ended with {code} and said nothing that can be read"
        )
        said = {"error": what, "problems": [line for line in stderr.strip().splitlines()[-20:] if line.strip()]}
    return {**said, "exit_code": code}


def _run(command: Sequence[str], folder: Path) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr; no process is left behind, however this one ends."""
    told: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, encoding="utf-8", errors="replace", **told) as process:
        try:
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=SECONDS)
                    return process.returncode, stdout, stderr
                except subprocess.TimeoutExpired:
                    continue  # what was raised in this thread meanwhile, as where memory passes its ceiling, is heard here
        finally:
            process.kill()
