#!/usr/bin/env python3
"""Builds the TensorRT engine of this folder: model.onnx and build.json and profiles.json in, one plan file out.

::

    python build_engine.py                       # model.plan beside this file
    python build_engine.py --engine /tmp/a.plan --level 5 --flag VERSION_COMPATIBLE

Needs Python 3.10 and `tensorrt` (10.12 or later) or `tensorrt_rtx`, nothing else. TensorRT-RTX builds without a GPU.
Exit code 0: built; 1: refused by the parser or the builder, with everything they said; 5: no SDK; 6: no room for the plan.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SDKS = ("tensorrt", "tensorrt_rtx")
# What a version need not have any more: 11 types every network strongly, and later ones may drop the name.
ALWAYS_ON = ("STRONGLY_TYPED",)
NEEDED = {"build.json": ("onnx", "engine"), "profiles.json": ("profiles",)}
# Which input of an attention's first layer says how long keys and values are.
LENGTHS = 6


class Failed(Exception):
    """It cannot be done: why, what was said, and the exit code."""

    def __init__(self, what: str, problems: Sequence[str] = (), code: int = 1) -> None:
        super().__init__(what)
        self.problems, self.code = list(problems), code


def read(name: str) -> dict[str, Any]:
    """Return the object in a file of this folder.

    Raises:
        Failed: it is not there, or is no object of the format that this script knows.
    """
    try:
        found = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failed(f"{name} cannot be read: {error}", ["copy the whole folder again, or convert the model again"]) from error
    if not isinstance(found, dict) or found.get("schema") != 1:
        raise Failed(f"{name} is no file of schema 1", ["this script belongs to the folder that it was written with"])
    if missing := [key for key in NEEDED[name] if not found.get(key)]:
        raise Failed(f"{name} lacks {', '.join(missing)}", ["copy the whole folder again, or convert the model again"])
    return found


def load_sdk(names: Sequence[str]) -> Any:
    """Return the first SDK that can be imported.

    Raises:
        Failed: none can.
    """
    why = []
    for name in names:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: its libraries are not where the loader looks
            why.append(f"{name}: {error}")
    raise Failed("no TensorRT here: pip install tensorrt (NVIDIA GPU) or tensorrt-rtx (builds on any x86-64 CPU)", why, 5)


def make_log(trt: Any) -> Any:
    """Return a logger that keeps what the SDK says: ``errors`` and ``warnings``, each line once. Builder errors appear nowhere else."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: dict[str, None] = {}
            self.warnings: dict[str, None] = {}

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors[msg.strip()] = None
            elif severity <= trt.ILogger.Severity.WARNING:
                self.warnings[msg.strip()] = None

    return Log()


def members(enum: Any) -> dict[str, Any]:
    """Return an enumeration of the SDK by name. Its integers mean other things in other versions."""
    return dict(enum.__members__)


def named(enum: Any, name: str) -> Any:
    """Return the member of that name.

    Raises:
        Failed: this version has none, with those it has.
    """
    if name not in members(enum):
        raise Failed(f"{enum.__name__} has no {name} in this version", [f"it has {', '.join(sorted(members(enum)))}"])
    return members(enum)[name]


def make_network(trt: Any, builder: Any, flags: Sequence[str]) -> Any:
    """Return an empty network with those creation flags."""
    kind = trt.NetworkDefinitionCreationFlag
    wanted = [name for name in flags if name in members(kind) or name not in ALWAYS_ON]
    return builder.create_network(sum(1 << int(named(kind, name)) for name in wanted))


def parse(trt: Any, network: Any, log: Any, path: Path) -> None:
    """``network`` is the ONNX file's, whose weights are found beside it.

    Raises:
        Failed: no such file, or the parser refuses nodes of it.
    """
    if not path.is_file():
        raise Failed(f"{path} is not there")
    if not (data := path.with_name("model.onnx.data")).is_file():
        raise Failed(f"{data} is not there, and the weights are in it", ["copy the whole folder again"])
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    problems = []
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        where = f"{error.node_name() or '(no node)'} [{error.node_operator() or '?'}]"
        stack: list[str] = getattr(error, "local_function_stack", list)()
        problems.append(f"{where}: {error.desc()}" + (f" (in {' > '.join(stack)})" if stack else ""))
    if any("initializer" in line for line in problems):
        problems.append("where weights cannot be imported model.onnx.data may be cut short: `calque validate FOLDER` tells")
    raise Failed("the parser refuses the model", problems or list(log.errors))


def tensors(network: Any) -> Iterator[tuple[str, Any]]:
    """Yield what goes in and out, each with its direction."""
    yield from (("input", network.get_input(i)) for i in range(network.num_inputs))
    yield from (("output", network.get_output(i)) for i in range(network.num_outputs))


def aliases(trt: Any, network: Any) -> dict[str, str] | None:
    """Return the input that each output shares its memory with; None where this version does not tell."""
    kind = members(trt.LayerType).get("KV_CACHE_UPDATE")
    if kind is None:
        return None
    layers = [layer for i in range(network.num_layers) if (layer := network.get_layer(i)).type == kind]
    return {layer.get_output(0).name: layer.get_input(0).name for layer in layers}


def require_in_place(found: Mapping[str, str] | None) -> None:
    """Leave quietly if the network writes every state where the manifest says.

    Raises:
        Failed: an engine of it would copy states, or lose them.
    """
    path = FOLDER / "manifest.json"
    states = json.loads(path.read_text(encoding="utf-8"))["states"] if path.is_file() else []
    wanted = {state["output"]: state["input"] for state in states if state["update"] == "in_place"}
    if lost := [f"{out} is not {source} in place" for out, source in wanted.items() if found is not None and found.get(out) != source]:
        raise Failed("the network does not write its states in place", lost)


def require_lengths(trt: Any, network: Any, wanted: int) -> None:
    """Leave quietly if so many attentions were told how many slots a row fills.

    Raises:
        Failed: a parser of before 11.1 looks for them at another place and drops them; a step would see slots that nothing was written to.
    """
    kind = members(trt.LayerType).get("ATTENTION_INPUT")
    layers = [layer for i in range(network.num_layers) if (layer := network.get_layer(i)).type == kind]
    told = sum(layer.num_inputs == LENGTHS + 1 and layer.get_input(LENGTHS) is not None for layer in layers)
    if told < wanted:
        raise Failed(
            f"{told} of {wanted} attentions know their rows' lengths: TRT_Attention takes TensorRT 11.1 or later, or TensorRT-RTX 1.7",
            ["convert with attention: standard for older ones"],
        )


def add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Mapping[str, Any]], log: Any) -> None:
    """``config`` knows the range of every input's shape.

    Raises:
        Failed: an input of changing shape has no range, or a range is not one.
    """
    inputs = {tensor.name: tensor for direction, tensor in tensors(network) if direction == "input"}
    dynamic = [name for name, tensor in inputs.items() if -1 in tuple(tensor.shape)]
    for entry in profiles:
        shapes = entry["shapes"]
        problems = [f"{name}: the network has no such input" for name in shapes if name not in inputs]
        problems += [f"{name} {tuple(inputs[name].shape)}: no range of shapes" for name in dynamic if name not in shapes]
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            if name not in inputs:
                continue
            set_range = profile.set_shape_input if inputs[name].is_shape_tensor else profile.set_shape
            try:
                set_range(name, *(tuple(shape[end]) for end in ("min", "opt", "max")))
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                problems.append(f"{name}: {shape} is no range: {type(error).__name__} {error}")
        if problems or config.add_optimization_profile(profile) < 0:
            raise Failed(f"profile {entry['name']!r} of profiles.json does not fit the network", problems or list(log.errors))


def configure(trt: Any, config: Any, build: Mapping[str, Any]) -> list[str]:
    """``config`` is what build.json says; return what this SDK has no word for.

    Raises:
        Failed: a name that this version does not know.
    """
    for name in build.get("builder_flags", []):
        config.set_flag(named(trt.BuilderFlag, name))
    for name in build.get("cleared_builder_flags", []):
        config.clear_flag(named(trt.BuilderFlag, name))
    for name, nbytes in build.get("memory_pool_limits", {}).items():
        config.set_memory_pool_limit(named(trt.MemoryPoolType, name), nbytes)
    config.builder_optimization_level = build.get("builder_optimization_level", 3)
    config.profiling_verbosity = named(trt.ProfilingVerbosity, build.get("profiling_verbosity", "DETAILED"))
    if (level := build.get("hardware_compatibility_level", "NONE")) != "NONE":  # TensorRT-RTX knows no other, and warns
        config.hardware_compatibility_level = named(trt.HardwareCompatibilityLevel, level)
    capabilities = build.get("compute_capabilities", [])
    if capabilities and not hasattr(trt, "ComputeCapability"):
        return [
            f"compute_capabilities {capabilities}: only TensorRT-RTX builds for other devices; this plan is for the device it is built on"
        ]
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            config.set_compute_capability(named(trt.ComputeCapability, name), i)
    return []


def write(path: Path, plan: Any) -> None:
    """``path`` holds the plan, replaced in one step; what stood there is whole until then."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(plan)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's are for their owner alone
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def peak_rss() -> int | None:
    """Return the most bytes of memory that this process had; None where the system does not say."""
    status = Path("/proc/self/status")  # of Linux: of this program alone, where what follows counts what started it too
    for line in status.read_text(encoding="ascii").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build_engine(trt: Any, build: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]], engine: Path, threads: int) -> dict[str, Any]:
    """``engine`` holds the plan; return what was measured.

    Raises:
        Failed: the parser or the builder refuses.
    """
    log = make_log(trt)
    builder = trt.Builder(log)
    if threads:
        builder.max_threads = threads
    network = make_network(trt, builder, build.get("network_flags", []))
    started = time.perf_counter()
    parse(trt, network, log, FOLDER / build["onnx"])
    parsed = time.perf_counter()
    pairs = aliases(trt, network)
    require_in_place(pairs)
    require_lengths(trt, network, build.get("attention_lengths", 0))
    config = builder.create_builder_config()
    warnings = configure(trt, config, build)
    add_profiles(builder, config, network, profiles, log)
    begun = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Failed("the builder refuses the network", list(log.errors) or ["it said nothing"])
    seconds = time.perf_counter() - begun
    write(engine, plan)
    return {
        "sdk": trt.__name__,
        "version": trt.__version__,
        "onnx": build["onnx"],
        "engine": str(engine),
        "parse_seconds": round(parsed - started, 3),
        "build_seconds": round(seconds, 3),
        "plan_bytes": engine.stat().st_size,
        "peak_rss_bytes": peak_rss(),
        "tensors": [
            {"name": tensor.name, "direction": direction, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
            for direction, tensor in tensors(network)
        ],
        "aliases": pairs,
        # Inputs of int64 are bound as they are: no one is to be warned of that.
        "warnings": warnings + [line for line in log.warnings if "Int64 binding" not in line],
    }


def show(result: Mapping[str, Any]) -> None:
    """Print what was built."""
    print(
        f"{result['sdk']} {result['version']}: {result['onnx']} parsed in {result['parse_seconds']} s, built in {result['build_seconds']} s"
    )
    rss = f", at most {result['peak_rss_bytes'] / 1e6:.0f} MB of memory" if result["peak_rss_bytes"] else ""
    print(f"{result['engine']}: {result['plan_bytes'] / 1e6:.2f} MB{rss}")
    for tensor in result["tensors"]:
        source = (result["aliases"] or {}).get(tensor["name"])
        print(f"  {tensor['direction']:6} {tensor['name']:32} {tensor['dtype']:6} {tensor['shape']}" + (f" = {source}" if source else ""))
    for line in result["warnings"]:
        print(f"warning: {line}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", type=Path, help="the file to write; default: what build.json names, beside this script")
    parser.add_argument("--sdk", choices=SDKS, help="default: the first that is installed")
    parser.add_argument("--flag", nargs="+", action="extend", default=[], metavar="NAME", help="more builder flags, as REFIT")
    parser.add_argument("--level", type=int, choices=range(6), metavar="0-5", help="builder optimization level")
    parser.add_argument("--threads", type=int, default=0, help="the most the builder may use; default: what it chooses")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build what the command line asks for and return the exit code."""
    asked = arguments(argv)
    code, result = 0, {}
    try:
        trt = load_sdk([asked.sdk] if asked.sdk else SDKS)
        build, profiles = read("build.json"), read("profiles.json")["profiles"]
        build["builder_flags"] = [*build.get("builder_flags", []), *asked.flag]
        if asked.level is not None:
            build["builder_optimization_level"] = asked.level
        result = build_engine(trt, build, profiles, asked.engine or FOLDER / build["engine"], asked.threads)
        show(result)
    except (Failed, OSError, ValueError, KeyError) as error:
        # A KeyError's text is the key alone.
        what = f"{error!r}" if isinstance(error, KeyError) else str(error)
        result = {"error": what, "problems": getattr(error, "problems", [])}
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = 6 if full else getattr(error, "code", 1)
        print(f"error: {what}", *(f"  {line}" for line in result["problems"]), sep="\n", file=sys.stderr)
    if asked.json:
        print(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main())
