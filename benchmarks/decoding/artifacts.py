"""The artifacts that decode: each converted once by the tool of its environment, and kept while nothing it comes of has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.conversion.environments import versions
from benchmarks.conversion.records import last_line
from benchmarks.conversion.shapes import SHAPES
from benchmarks.conversion.tools import CALQUE, Tool, calque, environment, genai, llamacpp, openvino, optimum
from benchmarks.decoding.worker import Failed

ROOT = Path(__file__).parents[2]
SETTINGS = ("padding=any", "padding=right", "operators=standard")
# What genai's builder does best with, of its own options.
BEST = ("prune_lm_head=true", "shared_embeddings=true", "fuse_mlp_gate_up=true", "accuracy_level=4", "is_symmetric=true")
ONNX_RUNTIME, OPENVINO, LLAMA_CPP = "onnx_runtime", "openvino", "llama_cpp"


@dataclass(frozen=True)
class Entry:
    """One row: the tool that makes its artifact, the engine that decodes with it, and what the engine is told.

    Rows that are told different things share an artifact; ``label`` tells them apart.
    """

    tool: Tool
    engine: str = ONNX_RUNTIME
    settings: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """Return what the tables call it."""
        return f"{self.tool.name}, {self.label}" if self.label else self.tool.name

    @property
    def runs_graph(self) -> bool:
        """Return whether ONNX Runtime runs it: that of this interpreter, the same for all that it runs."""
        return self.engine == ONNX_RUNTIME

    @property
    def python(self) -> Path:
        """Return the interpreter that has its runtime."""
        return Path(sys.executable) if self.runs_graph else self.tool.python


def entries(work: Path, precision: str = "fp32") -> list[Entry]:
    """Return what is compared in a precision, in the order of the tables; the peers' environments are made."""
    return {"fp32": wide_entries, "int8": int8_entries, "int4": int4_entries}[precision](work)


def int4_entries(work: Path) -> list[Entry]:
    """Return what has weights of 4 bits: each tool with its best options, table and head of 4 bits too but for Calque's default."""
    all_of_it = ("--set", "quantize_weights.head=int4", "--set", "quantize_weights.embedding=int4")
    ways = {"": (), "all": all_of_it, "all g128": (*all_of_it, "--set", "quantize_weights.group=128")}
    return [
        *(Entry(_calque("int4", way, *options)) for way, options in ways.items()),
        *(Entry(genai(work, *BEST, f"block_size={size}", precision="int4", name=f"genai builder b{size}")) for size in (32, 128)),
        Entry(openvino(work, "--sym", "--group-size", "64", "--ratio", "1.0", "--all-layers", weights="int4"), OPENVINO),
        Entry(llamacpp(work, "Q4_0", name="llama.cpp Q4_0"), LLAMA_CPP),
    ]


def int8_entries(work: Path) -> list[Entry]:
    """Return what has weights of 8 bits: each tool with its best options."""
    return [
        Entry(_calque("int8", "")),
        Entry(_calque("int8", "g128", "--set", "quantize_weights.group=128")),
        Entry(genai(work, *BEST, "block_size=128", precision="int8", name="genai builder b128")),
        Entry(openvino(work, weights="int8"), OPENVINO),
        Entry(llamacpp(work, "q8_0", name="llama.cpp Q8_0"), LLAMA_CPP),
    ]


def _calque(precision: str, way: str, *options: str) -> Tool:
    """Return Calque in a precision, as genai's builder does it: padding on the right, logits of the last position alone."""
    made = calque(Path(sys.executable), "--precision", precision, "--set", "padding=right", "--logits", "last", *options)
    return replace(made, name=" ".join(filter(None, (CALQUE, precision, way))))


def wide_entries(work: Path) -> list[Entry]:
    """Return what is fp32.

    All is fp32, cache and arithmetic included: a runtime that would take less by itself is told so. llama.cpp's flash
    attention is faster on prompts and 7e-3 σ away from the others on S, as half precision is, whatever the type of the
    cache; without it, it is 1e-4 σ. So it has a row without, and one as it comes.
    """
    python = Path(sys.executable)
    # The builder's default may give the logits of the last position alone, which is less work than the others do.
    whole = "prune_lm_head=false"
    return [
        *(Entry(calque(python, "--set", setting)) for setting in SETTINGS),
        Entry(genai(work, whole)),
        Entry(optimum(work)),
        Entry(openvino(work), OPENVINO, {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}),
        Entry(llamacpp(work), LLAMA_CPP, {"cache": "F32", "flash": "DISABLED"}),
        Entry(llamacpp(work), LLAMA_CPP, label="as it comes"),
    ]


def ensure(tool: Tool, shape: str, work: Path) -> Path:
    """Return the folder of the artifact; converted if it is not there, or if something it comes of has changed.

    Raises:
        Failed: the tool did not convert.
    """
    folder = place(tool, shape, work)
    stamp = folder.with_name(f"{folder.name}.json")
    wanted = origin(tool, shape)
    if folder.is_dir() and stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return folder
    print(f"{shape}, {tool.name}: converting into {folder}", file=sys.stderr, flush=True)
    discard(tool, shape, work)
    _convert(tool, work / f"model-{shape}", folder, work)
    stamp.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    return folder


def place(tool: Tool, shape: str, work: Path) -> Path:
    """Return where the artifact lies."""
    return work / f"artifact-{shape}-{tool.slug}"


def discard(tool: Tool, shape: str, work: Path) -> None:
    """The artifact is not there."""
    folder = place(tool, shape, work)
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


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
        raise Failed(f"converting ended with exit code {done.returncode}: `{last_line(log, {work: 'WORK', ROOT: 'ROOT'})}`")
