"""Who is compared: the tool that makes the artifact, what runs it, and why it goes wrong where it does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.conversion.environments import ensure
from benchmarks.conversion.tools import MODEL, OUT, Tool, calque, genai, openvino, optimum
from benchmarks.padding.case import LENGTHS
from benchmarks.padding.models import Artifact, Graphs, drive

ROOT = Path(__file__).parents[2]
# Of ONNX Runtime 1.31's GroupQueryAttention on the CPU; its schema and kernel say so.
BY_COUNT = (
    "GroupQueryAttention is told how many tokens a row has, and nothing of where they lie: it takes the first slots, "
    "turns keys by slot, and sees padding on the left as tokens"
)
FIRST_ROW = (
    "the graph has cosines for every row and hands out their indices as position_ids, of which GroupQueryAttention reads the first alone "
    "in a prompt: every row is turned by the first row's positions, keys after padding are kept turned too far, and steps ask with true "
    "positions"
)
Answer = Callable[[Path, str], list[NDArray[np.float32]]]


@dataclass(frozen=True)
class Contender:
    """A tool, what answers with its artifact to a side of padding, and the cause of what is wrong, if something is."""

    tool: Tool
    answer: Answer
    cause: str = ""


def contenders(work: Path) -> list[Contender]:
    """Return who is compared, in the order of the tables; environments are made."""
    python = Path(sys.executable)
    ours = [Contender(calque(python, "--set", setting), _artifact) for setting in ("padding=any", "padding=right", "operators=standard")]
    mobius = ("-m", "mobius", "build", "--model", MODEL, OUT, "--ep", "cpu", "--dtype", "f32")
    return [
        *ours,
        Contender(_exporters(work, "cpu"), _two, FIRST_ROW),
        Contender(_exporters(work), _two),
        Contender(genai(work, "prune_lm_head=false"), _one, BY_COUNT),
        Contender(Tool("mobius", ensure("exporters", work), f"mobius {' '.join(mobius[2:])}", mobius), _one, BY_COUNT),
        Contender(optimum(work), _one),
        Contender(openvino(work), _stateful(work)),
    ]


def _exporters(work: Path, *fusions: str) -> Tool:
    python, script = ensure("exporters", work), Path(__file__).with_name("exporters.py")
    name = " ".join(("transformers.exporters", *(f"ort_fusions={provider}" for provider in fusions)))
    told = f"OnnxConfig(dynamic=True, ort_fusions={fusions[0]!r})" if fusions else "OnnxConfig(dynamic=True)"
    return Tool(name, python, f"OnnxExporter().export_for_generation(model, inputs, {told})", (str(script), MODEL, OUT, *fusions))


def _artifact(folder: Path, side: str) -> list[NDArray[np.float32]]:
    return drive(Artifact(folder), side)


def _one(folder: Path, side: str) -> list[NDArray[np.float32]]:
    return drive(Graphs(folder / "model.onnx"), side)


def _two(folder: Path, side: str) -> list[NDArray[np.float32]]:
    return drive(Graphs(folder / "prefill.onnx", folder / "decode.onnx"), side)


def _stateful(work: Path) -> Answer:
    def answer(folder: Path, side: str) -> list[NDArray[np.float32]]:
        file = folder.with_name(f"{folder.name}.npz")
        command = [str(ensure("openvino", work)), "-m", "benchmarks.padding.answers", str(folder), str(file)]
        subprocess.run(command, check=True, cwd=ROOT)
        with np.load(file) as found:
            return [found[f"{side}{row}"] for row in range(len(LENGTHS))]

    return answer
