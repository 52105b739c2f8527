"""The tools that convert, each as the command its users type."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.conversion.environments import SOURCES, ensure

CALQUE, OPTIMUM, GENAI, OPENVINO, LLAMACPP = "Calque", "optimum-onnx", "genai builder", "OpenVINO", "llama.cpp"
PEERS = (GENAI, OPTIMUM, OPENVINO, LLAMACPP)
GGUF = "model.gguf"
FP32 = "fp32"
MODEL, OUT, CACHE = "MODEL", "OUT", "CACHE"


@dataclass(frozen=True)
class Tool:
    """A tool that converts: its interpreter, and the arguments after it; MODEL, OUT and CACHE in these stand for folders.

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
        return [str(self.python), *(_filled(argument, folders) for argument in self.arguments)]


def _filled(argument: str, folders: Mapping[str, str]) -> str:
    first, slash, rest = argument.partition("/")
    return f"{folders[first]}{slash}{rest}" if first in folders else argument


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


def genai(work: Path, *options: str, precision: str = FP32, name: str = GENAI) -> Tool:
    """Return the builder of onnxruntime-genai with ``--extra_options``, its environment made."""
    extra = ("--extra_options", *options) if options else ()
    builder = ("-m", "onnxruntime_genai.models.builder", "-i", MODEL, "-o", OUT, "-p", precision, "-e", "cpu", "-c", CACHE, *extra)
    return Tool(name, ensure("genai", work), f"python {' '.join(builder)}", builder)


def openvino(work: Path, *options: str, weights: str = FP32, name: str = OPENVINO) -> Tool:
    """Return OpenVINO's exporter, optimum-intel, with its options for the weights, its environment made."""
    python = ensure("openvino", work)
    task = ("--task", "text-generation-with-past", "--weight-format", weights)
    export = ("export", "openvino", "--model", MODEL, *task, *options, OUT)
    return Tool(name, python, f"optimum-cli {' '.join(export)}", (str(python.with_name("optimum-cli")), *export))


def llamacpp(work: Path, kind: str = "f32", name: str = LLAMACPP) -> Tool:
    """Return llama.cpp's converter, followed by its quantizer for a type such as Q4_0, its environment made."""
    python = ensure("llamacpp", work)
    converter = python.parents[1] / SOURCES["llamacpp"].folder / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    script = Path(__file__).with_name("gguf_file.py")
    shown = f"python {script.name} {converter.name} MODEL OUT/{GGUF} {kind}"
    return Tool(name, python, shown, (str(script), str(converter), MODEL, f"{OUT}/{GGUF}", kind))


def tools(work: Path, calque_python: Path) -> list[Tool]:
    """Return Calque and its peers as they are without options, their environments made."""
    return [calque(calque_python), optimum(work), genai(work), openvino(work), llamacpp(work)]


def environment(work: Path) -> dict[str, str]:
    """Return the environment of every tool: no hub, no way to import this checkout by chance."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(work / "hf-home")}
