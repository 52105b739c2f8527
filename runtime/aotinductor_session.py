"""Packages of AOTInductor over one file of weights, which is mapped once, whatever number of packages reads it.

The code of a package has no weights: it is given them before it is run at all, as it crashes the process otherwise.
"""

from __future__ import annotations

import json
import math
import platform
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.artifact import SHARED_WEIGHTS
from calque.errors import ArtifactUnreadable, TargetUnavailable
from calque.runtime.artifact_session import REDO
from calque.runtime.cuda_graphs import CudaGraphs
from calque.runtime.torch_session import TorchSession

if TYPE_CHECKING:
    from torch import Tensor

    from calque.artifact import Artifact
    from calque.runtime.torch_session import Run

# The one model in a package.
MODEL = "model"
# A weight that is a switch, int8 [1]: whether products with integers round what they read to 8 bits.
ROUNDS = "calque.rounds"

# What x86 processors have of vectors, each as well as those before it.
WIDTHS = ("", "AVX2", "AVX512")
# Where Linux says what else a processor has, and what of that a compiler makes use of where it compiles for this very one.
PROCESSOR = Path("/proc/cpuinfo")
EXTENSION = re.compile(r"(s?sse|avx|amx|bmi|fma|sha|asimd|sve|i8mm|bf16)\w*|v?aes|v?pclmulqdq|gfni|f16c|movbe|popcnt|abm|adx")
# What a package of this very machine says of it in its metadata.
EXTENSIONS = "calque.extensions"
# safetensors' dtype names, and torch's.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class AOTInductorSession(TorchSession):
    """Runs packages of AOTInductor; states go in and come out. ``exact``: products round nothing, whatever the artifact's do."""

    runtime = "AOTInductor"

    def __init__(self, artifact: Artifact, threads: int = 0, exact: bool = False) -> None:
        super().__init__(artifact, threads)
        self._exact = exact
        self._cuda = artifact.recipe.get("options", {}).get("device") == "cuda"
        self._weights: dict[str, Tensor] = {}

    def load(self, path: Path, graph: str) -> Run:
        """Return what runs the package at ``path``, its weights loaded.

        Raises:
            ArtifactUnreadable: the weights are missing, cut short, or not those of the package.
            TargetUnavailable: the package was compiled for another processor, or for a GPU and there is none.
        """
        import torch
        from torch._C import _aoti

        if self._cuda and not torch.cuda.is_available():
            raise TargetUnavailable(f"{path.name} was compiled for an NVIDIA GPU, and torch finds none", fix="run it where one is")

        weights = self.weights()
        package: Any = _aoti.AOTIModelPackageLoader  # of which torch's types know not everything
        _require_processor(package.load_metadata_from_package(str(path), MODEL), path)
        loader = package(str(path), MODEL, False, 1, -1)
        names = loader.get_constant_fqns()
        if missing := sorted(set(names) - set(weights)):
            raise ArtifactUnreadable(f"{SHARED_WEIGHTS} lacks weights of {path.name}", missing, REDO)
        loader.load_constants({name: weights[name] for name in names}, False, True, True)
        run: Run = loader.run
        return CudaGraphs(run) if self._cuda else run

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, over the mapped file, the same tensors each time.

        Raises:
            ArtifactUnreadable: the file is missing or cut short.
        """
        if not self._weights:
            self._weights = mapped(self.artifact.folder / SHARED_WEIGHTS)
            if self._exact and ROUNDS in self._weights:
                self._weights[ROUNDS] = self._weights[ROUNDS] & 0
            if self._cuda:
                self._weights = {name: tensor.cuda() for name, tensor in self._weights.items()}
        return self._weights


def _require_processor(metadata: dict[str, str], path: Path) -> None:
    """Leave quietly if this processor has what the package was compiled for: what it has not would end the process.

    Raises:
        TargetUnavailable: it is of another kind, or older.
    """
    import torch

    machine, vectors = metadata.get("AOTI_MACHINE", ""), metadata.get("AOTI_CPU_ISA", "").split()[:1]
    here = torch.backends.cpu.get_cpu_capability()
    wanted = vectors[0] if vectors else ""
    older = wanted in WIDTHS and here not in WIDTHS[WIDTHS.index(wanted) :]
    fix = "convert the model on a machine of this kind, or without march: native"
    if older or machine not in ("", platform.machine()):
        what = f"{path.name} was compiled for {machine} with {wanted or 'no vectors'}, this is {platform.machine()} with {here}"
        raise TargetUnavailable(what, fix=fix)
    if asked := metadata.get(EXTENSIONS, "").split():
        found = extensions()
        lacking = [name for name in asked if name not in found]
        if found and lacking:
            raise TargetUnavailable(f"{path.name} was compiled for a processor that has more than this one", lacking, fix)


def extensions() -> list[str]:
    """Return what this processor has that a compiler makes use of, by Linux's names; empty where nothing says it."""
    lines = PROCESSOR.read_text(encoding="utf-8").splitlines() if PROCESSOR.is_file() else []
    words = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(word for word in words if EXTENSION.fullmatch(word))


def mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, over its mapped pages.

    Raises:
        ArtifactUnreadable: the file is missing, cut short, or no safetensors file.
    """
    import torch

    entries, start = header(path)
    pages: Any = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for name, entry in entries.items():
        low, high = entry["data_offsets"]
        flat = pages[start + low : start + high].view(getattr(torch, DTYPES[entry["dtype"]]))
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of its tensors, and where their bytes begin.

    Raises:
        ArtifactUnreadable: the file is missing, cut short, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(min(length, path.stat().st_size)))
        entries.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        for entry in entries.values():
            low, high = entry["data_offsets"]
            if DTYPES[entry["dtype"]] and (high - low) % max(1, math.prod(entry["shape"])):
                raise ValueError(f"{entry} is of no size that fits")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is no safetensors file: {error}"
        raise ArtifactUnreadable(f"{path} cannot be read: {why}", fix=REDO) from error
    if short := max([0, *ends]) + 8 + length - path.stat().st_size:
        raise ArtifactUnreadable(f"{path} is not whole: it ends {abs(short)} bytes too {'early' if short > 0 else 'late'}", fix=REDO)
    return entries, 8 + length
