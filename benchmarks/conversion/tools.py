"""The three tools that convert, each as the command its users type."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.conversion.environments import ensure

CALQUE, OPTIMUM, GENAI = "Calque", "optimum-onnx", "genai builder"
MODEL, OUT, CACHE = "MODEL", "OUT", "CACHE"


@dataclass(frozen=True)
class Tool:
    """A tool that converts: its interpreter, and the arguments after it, where MODEL, OUT and CACHE stand for folders.

    ``mark`` is what its output says when it begins what no peer does.
    """

    name: str
    python: Path
    shown: str
    arguments: tuple[str, ...]
    mark: str | None = None

    @property
    def slug(self) -> str:
        """Return the name as part of a file's name."""
        return self.name.lower().replace(" ", "-")

    def command(self, model: Path, out: Path, cache: Path) -> list[str]:
        """Return the command with its folders filled in."""
        folders = {MODEL: str(model), OUT: str(out), CACHE: str(cache)}
        return [str(self.python), *(folders.get(argument, argument) for argument in self.arguments)]


def calque(python: Path, *options: str) -> Tool:
    """Return Calque in the interpreter, with options of ``convert``, which become part of its name."""
    convert = ("convert", "--target", "onnxruntime", MODEL, "-o", OUT, "--force", *options)
    # The script `convert` may be another program's on some machines; the module is what it runs.
    name = " ".join((CALQUE, *(option for option in options if option != "--set")))
    return Tool(name, python, " ".join(convert), ("-m", "calque.cli", *convert), mark="] reference ")


def optimum(work: Path) -> Tool:
    """Return optimum-onnx, its environment made."""
    python = ensure("optimum", work)
    export = ("export", "onnx", "--model", MODEL, "--task", "text-generation-with-past", OUT)
    return Tool(OPTIMUM, python, f"optimum-cli {' '.join(export)}", (str(python.with_name("optimum-cli")), *export))


def genai(work: Path, *options: str) -> Tool:
    """Return the builder of onnxruntime-genai with more options, its environment made."""
    builder = ("-m", "onnxruntime_genai.models.builder", "-i", MODEL, "-o", OUT, "-p", "fp32", "-e", "cpu", "-c", CACHE, *options)
    return Tool(GENAI, ensure("genai", work), f"python {' '.join(builder)}", builder)


def tools(work: Path, calque_python: Path) -> list[Tool]:
    """Return Calque and its peers as they are without options, their environments made."""
    return [calque(calque_python), optimum(work), genai(work)]


def environment(work: Path) -> dict[str, str]:
    """Return the environment of every tool: no hub, no way to import this checkout by chance."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(work / "hf-home")}
