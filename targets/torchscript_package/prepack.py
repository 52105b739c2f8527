"""Lays the weights of a ``.ptl`` out for XNNPACK and compares what it computes then: standard library and a torch of 1.13 to 2.12.

``prepack.py model.ptl model.xnnpack.ptl`` ends with 0 written and right, 3 other numbers, 5 this torch has no XNNPACK; the last line of
what it prints is JSON: the version of torch, the largest difference, and how many of its operators are of XNNPACK.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.backends.xnnpack
import torch.jit.mobile
from torch.utils.mobile_optimizer import optimize_for_mobile

MOBILE: Any = torch.jit.mobile  # without types

KEPT = ["get_all_bundled_inputs", "get_num_bundled_inputs"]
# Of the largest value: another order of sums, and nothing else.
TOLERANCE = 1e-4
METADATA = "calque.json"


def calls(examples: Sequence[Sequence[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """Yield the calls that the file brings along, and longer ones with the same names of sizes."""
    for example in examples:
        yield list(example)
    yield [longer(value) for value in examples[0]]


def longer(value: torch.Tensor) -> torch.Tensor:
    """Return an input of two rows, random where it is of floats."""
    rows = torch.cat([value, value])
    return torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) if value.is_floating_point() else rows


def main(source: str, destination: str) -> int:
    """Return the exit code."""
    found: dict[str, Any] = {"torch": torch.__version__}
    jit: Any = torch.jit
    if not torch.backends.xnnpack.enabled:  # type: ignore[attr-defined]  # a module that stands in for itself
        print(json.dumps({**found, "error": "this torch was built without XNNPACK: 2.12 is the last that has it"}))
        return 5
    extra = {METADATA: ""}
    module = jit.load(source, _extra_files=extra).eval()
    laid = optimize_for_mobile(module, preserved_methods=[name for name in KEPT if hasattr(module, name)])
    text = extra[METADATA]
    laid._save_for_lite_interpreter(destination, _extra_files={METADATA: text.decode() if isinstance(text, bytes) else text})
    before, after = MOBILE._load_for_lite_interpreter(source), MOBILE._load_for_lite_interpreter(destination)
    worst = 0.0
    with torch.no_grad():
        for inputs in calls(before.run_method("get_all_bundled_inputs")):
            for expected, value in zip(results(before(*inputs)), results(after(*inputs)), strict=True):
                if expected.numel():
                    worst = max(worst, float((expected - value).abs().max() / expected.abs().max().clamp(min=1e-6)))
    found["worst"] = worst
    found["prepacked"] = sum(name.startswith("prepacked::") for name in MOBILE._export_operator_list(after))
    print(json.dumps(found))
    return 0 if worst <= TOLERANCE else 3


def results(given: Any) -> Any:
    """Return the results of a call, of which one alone is no tuple."""
    return given if isinstance(given, (tuple, list)) else [given]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(*sys.argv[1:3]))
