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

from calque.artifact import Artifact
from calque.pipeline import convert
from calque.recipe import Dims, Parity, Recipe
from tests.tiny_encoders import save_encoder
from tests.tiny_models import TINY, save_random

HERE = Path(__file__).parent
SLOTS = 48


def decoder(folder: Path, *scenarios: str, **options: str) -> Path:
    """The folder is a package of a tiny decoder in fp16, whose cache is slots; proved by those scenarios, or by all."""
    save_random(TINY["llama"], folder / "source")
    return _package(folder, parity=Parity(scenarios=scenarios) if scenarios else Parity(), options=options)


def encoder(folder: Path) -> Path:
    """The folder is a package of a tiny encoder in fp16."""
    save_encoder(folder / "source", "bert", task="text-classification")
    return _package(folder, task="text-classification")


def _package(folder: Path, **settings: Any) -> Path:
    out = folder / "package"
    dims = Dims(batch_size=(1, 1, 5), sequence_length=(1, 1, SLOTS), max_length=SLOTS)
    settings["options"] = {**settings.get("options", {}), "sdk": "none"}
    convert(Recipe(model=str(folder / "source"), target="tensorrt", dims=dims, **settings), out)
    return out


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

    def run(self, *arguments: str, sdk: str = "tensorrt", bandwidth: float | None = 10, **environment: str) -> Ran:
        """Return how the package's own script ended; without a ``bandwidth`` it measures it."""
        place = self.folder / sdk
        place.mkdir(exist_ok=True)
        shutil.copy(HERE / "fake_tensorrt.py", place / f"{sdk}.py")
        env = {**os.environ, "PYTHONPATH": str(place), "LD_LIBRARY_PATH": str(self.folder), "OMP_NUM_THREADS": "1", **environment}
        given = [
            "--sdk",
            sdk,
            "--json",
            *([f"--bandwidth={bandwidth}"] if bandwidth else []),
            "--prompt-tokens",
            "9",
            "--new-tokens",
            "6",
            *arguments,
        ]
        ended = subprocess.run(
            [sys.executable, "-W", "error", "run_engine.py", *given], cwd=self.package, env=env, capture_output=True, text=True
        )
        lines = ended.stdout.splitlines()
        return Ran(ended.returncode, json.loads(lines[-1]) if lines else {}, ended.stdout + ended.stderr)
