"""Artifacts as the TensorRT target makes them, and the fake GPU that their scripts run on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from calque.artifact import Artifact
from calque.pipeline import convert
from calque.recipe import Dims, Parity, Recipe
from calque.targets._tensorrt_package import write_package
from tests.tiny_encoders import save_encoder
from tests.tiny_models import TINY, save_random

HERE = Path(__file__).parent
SLOTS = 48
BUILD = {
    "schema": 1, "onnx": "model.onnx", "engine": "model.plan", "network_flags": ["STRONGLY_TYPED"], "builder_flags": [],
    "memory_pool_limits": {}, "builder_optimization_level": 3, "profiling_verbosity": "DETAILED", "hardware_compatibility_level": "NONE",
    "compute_capabilities": [],
}  # fmt: skip


def decoder(folder: Path, *scenarios: str) -> Path:
    """The folder is a package of a tiny decoder in fp16, whose cache is slots; proved by those scenarios, or by all."""
    save_random(TINY["llama"], folder / "source")
    options = {"cache": "static", "operators": "standard"}
    parity = Parity(scenarios=scenarios) if scenarios else Parity()
    return _package(folder, Recipe(model=str(folder / "source"), target="onnxruntime", precision="fp16", options=options,
                                   dims=Dims(max_length=SLOTS), parity=parity))  # fmt: skip


def encoder(folder: Path) -> Path:
    """The folder is a package of a tiny encoder in fp16."""
    save_encoder(folder / "source", "bert", task="text-classification")
    return _package(
        folder,
        Recipe(
            model=str(folder / "source"),
            target="onnxruntime",
            task="text-classification",
            precision="fp16",
            options={"operators": "standard"},
        ),
    )


def _package(folder: Path, recipe: Recipe) -> Path:
    out = folder / "package"
    convert(recipe, out)
    without_softmax_precision(out / "model.onnx")
    write_package(out, BUILD, {"schema": 1, "profiles": [profile(out, "default", (1, 1), (5, SLOTS))]})
    return out


def without_softmax_precision(path: Path) -> None:
    """The file's attention lacks the attribute that TensorRT's parser refuses."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in [attribute for attribute in node.attribute if attribute.name == "softmax_precision"]:
            node.attribute.remove(attribute)
    onnx.save(model, path)


def profile(folder: Path, name: str, low: tuple[int, int], high: tuple[int, int]) -> dict[str, Any]:
    """Return the profile from one (rows, columns) to another."""
    inputs = Artifact.read(folder).graphs["model"].inputs

    def at(shape: tuple[int | str, ...], rows: int, columns: int) -> list[int]:
        return [{"batch_size": rows}.get(size, columns) if isinstance(size, str) else size for size in shape]

    shapes = {spec.name: {"min": at(spec.shape, *low), "opt": at(spec.shape, *low), "max": at(spec.shape, *high)} for spec in inputs}
    return {"name": name, "shapes": shapes}


@dataclass(frozen=True)
class Ran:
    """How a script ended: its exit code, the object on its last line, and all it said."""

    code: int
    said: dict[str, Any]
    text: str

    def line(self, scenario: str) -> dict[str, Any]:
        found: dict[str, Any] = next(line for line in self.said["scenarios"] if line["name"] == scenario)
        return found


@dataclass(frozen=True)
class Gpu:
    """A folder with a fake SDK and a fake CUDA runtime, and a copy of a package that runs on them."""

    folder: Path
    package: Path

    @classmethod
    def over(cls, package: Path, folder: Path) -> Gpu:
        """Return one for a copy of the package; only the copy may be changed."""
        (folder / "gpu").mkdir(parents=True)
        source = ["cc", "-O1", "-shared", "-fPIC", "-o", str(folder / "gpu" / "libcudart.so.13"), str(HERE / "fake_cudart.c")]
        subprocess.run(source, check=True)
        shutil.copytree(package, folder / "package")
        return cls(folder / "gpu", folder / "package")

    def build(self, fault: str = "", profiles: list[dict[str, Any]] | None = None) -> None:
        """The package has a plan of the fake SDK."""
        known = json.loads((self.package / "profiles.json").read_text())["profiles"]
        aliases = {state.output: state.input for state in Artifact.read(self.package).states}
        plan = {"onnx": str(self.package / "model.onnx"), "profiles": profiles or known, "aliases": aliases, "fault": fault}
        (self.package / "model.plan").write_text(json.dumps(plan))

    def run(self, *arguments: str, sdk: str = "tensorrt", **environment: str) -> Ran:
        """Return how the package's own script ended."""
        place = self.folder / sdk
        place.mkdir(exist_ok=True)
        shutil.copy(HERE / "fake_tensorrt.py", place / f"{sdk}.py")
        env = {**os.environ, "PYTHONPATH": str(place), "LD_LIBRARY_PATH": str(self.folder), "OMP_NUM_THREADS": "1", **environment}
        given = ["--sdk", sdk, "--json", "--bandwidth", "10", "--prompt-tokens", "9", "--new-tokens", "6", *arguments]
        ended = subprocess.run(
            [sys.executable, "-W", "error", "run_engine.py", *given], cwd=self.package, env=env, capture_output=True, text=True
        )
        lines = ended.stdout.splitlines()
        return Ran(ended.returncode, json.loads(lines[-1]) if lines else {}, ended.stdout + ended.stderr)
