"""An engine built of an artifact where a builder is installed, and run where there is a GPU, by the scripts that the artifact carries."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from calque.artifact import ENGINE, Artifact, Check, round_up
from calque.console import size
from calque.errors import TargetUnavailable, WontFit
from calque.targets import Built

if TYPE_CHECKING:
    from calque.traced import TracedModel

Sdk = Literal["auto", "tensorrt", "tensorrt-rtx", "none"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
DATA = "model.onnx.data"
VIA = "torch-tensorrt"
# What run_engine.py ends with where no SDK, no GPU, or none that can load the engine is here.
NOTHING_RAN = 5
# And build_engine.py where the plan has no room.
DISK_FULL = 6
INSTALL = "pip install tensorrt-rtx brings one that needs no GPU; or run build_engine.py where TensorRT is"
NO_GPU = "no GPU is here; run_engine.py runs the engine on one and compares it with reference/"
# The builder itself, and how often the weights are in memory while it works: within 4 % of what 5M to 135M parameters took in fp16,
# int8 and int4 (benchmarks/engines/results.md).
BUILDER_BYTES, WEIGHT_COPIES = 270_000_000, 4


def builder_bytes(weights: int) -> int:
    """Return about how much memory the builder takes of so many bytes of weights."""
    return BUILDER_BYTES + WEIGHT_COPIES * weights


def build(artifact: Artifact, sdk: Sdk, room: int | None) -> Built:
    """Return what building came to with the artifact's own script, in at most ``room`` bytes of memory."""
    by, why = chosen(sdk)
    if not by:
        return Built(Check("not_run", None, why), Check("not_run", None, why))
    takes = builder_bytes((artifact.folder / DATA).stat().st_size)
    if room is not None and takes > room:
        why = f"building takes about {size(takes)} of memory, --max-memory leaves {size(room)}"
        return Built(Check("not_run", by, why), Check("not_run", by, why))
    from calque.targets._tensorrt_package import run_build

    found = run_build(artifact.folder, MODULES[by])
    if found["exit_code"] == DISK_FULL:
        raise WontFit(
            f"the disk that holds {artifact.folder.parent} is full", [str(found["error"])], "free some space, or name another with -o"
        )
    found["engine"] = ENGINE  # and not where the folder lies while it is made
    if "error" in found:
        lines = (str(found["error"]), *map(str, found.get("problems", ())))
        return Built(
            Check("failed", by, lines[0]), Check("not_run", by, "there is no engine"), tuple(f"build: {line}" for line in lines), found
        )
    said = f"Built by {by} {found['version']} in {found['build_seconds']:.1f} s: {ENGINE}, {size(found['plan_bytes'])}"
    return _executed(artifact, by, found, f"{said}; the builder took {size(found['peak_rss_bytes'])} of memory.")


def build_traced(artifact: Artifact, load: Callable[[], TracedModel]) -> Built:
    """Return what building came to with torch-tensorrt, from the traced program and not from the file."""
    from calque.targets import _torch_tensorrt
    from calque.targets._tensorrt_package import PROFILES

    [profile, *_] = json.loads((artifact.folder / PROFILES).read_text(encoding="utf-8"))["profiles"]
    begun = time.monotonic()
    _torch_tensorrt.build(load(), artifact.folder / ENGINE, profile["shapes"])
    seconds, written = time.monotonic() - begun, (artifact.folder / ENGINE).stat().st_size
    found = {"sdk": VIA, "version": version(VIA), "build_seconds": seconds, "plan_bytes": written}
    return _executed(artifact, VIA, found, f"Built by {VIA} from the traced program in {seconds:.1f} s: {ENGINE}, {size(written)}.")


def _executed(artifact: Artifact, by: str, found: Mapping[str, Any], said: str) -> Built:
    """Return an engine's build, and whether it gives the eager model's answers on the GPU of this machine."""
    tools = {by: str(found["version"])}
    if not has_gpu():
        return Built(Check("passed", by), Check("not_run", by, NO_GPU), (), found, (said,), tools)
    from calque.targets._tensorrt_package import run_validation

    ran = run_validation(artifact.folder)
    if ran["exit_code"] == NOTHING_RAN:
        return Built(Check("passed", by), Check("not_run", by, str(ran["error"])), (), found, (said,), tools)
    # The exit code is the verdict: a run that ends with wrong numbers says so in its scenarios, and has no error.
    wrong = [f"{row['name']}: {row['reason']}" for row in ran.get("scenarios", ()) if row["status"] == "failed"]
    why = [str(ran["error"])] if "error" in ran else wrong
    execution = Check("failed", by, "; ".join(why[:1])) if ran["exit_code"] else Check("passed", by, worst=round_up(ran["max_sigma"]))
    failures = tuple(f"execution: {line}" for line in why)
    return Built(Check("passed", by), execution, failures, {**found, "execution": ran}, (said,), tools)


def chosen(sdk: Sdk) -> tuple[str, str]:
    """Return the SDK that builds here, or nothing and why none does."""
    if sdk == "none":
        return "", "the option sdk: none builds nothing here"
    here = {name: find_spec(module) is not None for name, module in MODULES.items()}
    if sdk != "auto":
        return (sdk, "") if here[sdk] else ("", f"{sdk} is not installed: pip install {sdk}")
    if here["tensorrt"] and has_gpu():
        return "tensorrt", ""
    if here["tensorrt-rtx"]:
        return "tensorrt-rtx", ""
    return "", f"no builder is here: {INSTALL}"


def require(sdk: Sdk, needed: str | None) -> None:
    """Leave quietly if what is needed, a build or an execution, can be had on this machine.

    Raises:
        TargetUnavailable: it cannot.
    """
    by, why = chosen(sdk)
    if needed and not by:
        raise TargetUnavailable(f"--require {needed}: nothing here builds an engine", [why], INSTALL)
    if needed == "execution" and not has_gpu():
        raise TargetUnavailable("--require execution: no GPU is here", fix="convert on a machine with one, or run run_engine.py there")


def has_gpu() -> bool:
    """Return whether CUDA's driver finds a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
