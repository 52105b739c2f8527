"""The operators of the last PyTorch for phones, 2.1.0: what a ``.ptl`` may call, with how many arguments of which types.

It is generated, by this file run as a script where torch 2.1.0 is installed, with nothing but that:

    python targets/_mobile_operators.py > targets/_mobile_operators.json

Left out is what no lowered model calls: what writes in place or into ``out``, gradients, other devices' own operators.
Source: pytorch_android_lite 2.1.0 and LibTorch-Lite 2.1.0 register the operators of torch 2.1.0 under the same names.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path

NAMESPACES = ("aten", "prim", "quantized")
ELSEWHERE = re.compile(r"backward|foreach|cudnn|miopen|cuda|mps|sparse|nested|mkldnn|fft|linalg|fused|functional_sym|_coo|_csr|_bs")
# Of `code`: versions that the interpreter of 2.1.0 reads. Source: caffe2/serialize/versions.h@v2.1.0.
OLDEST_BYTECODE, NEWEST_BYTECODE = 3, 8


@cache
def operators() -> dict[str, list[str]]:
    """Return the types of the arguments of every operator of the runtime, by name and overload."""
    held = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {name: types.split(";") if types else [] for name, types in held["operators"].items()}


@cache
def runtime_version() -> str:
    """Return the version of the runtime whose operators these are."""
    version: str = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))["torch"]
    return version


def _generated() -> dict[str, object]:
    """Return the table, of the torch that is installed."""
    import torch

    found = {}
    for schema in torch._C._jit_get_all_schemas():
        namespace, name = schema.name.split("::")
        written = (name.endswith("_") and not name.endswith("__")) or any(each.is_out for each in schema.arguments)
        if namespace not in NAMESPACES or written or ELSEWHERE.search(name):
            continue
        full = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        found[full] = ";".join(str(argument.type) for argument in schema.arguments)
    return {"schema": 1, "torch": torch.__version__.split("+")[0], "operators": dict(sorted(found.items()))}


if __name__ == "__main__":
    json.dump(_generated(), sys.stdout, indent=0)
    sys.stdout.write("\n")
