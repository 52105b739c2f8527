"""Runs a ``.ptl`` in the lite interpreter of the torch that is installed: standard library and torch, 2.1 or any other.

``run_lite.py model.ptl inputs.pt outputs.pt`` reads a list of calls, each a list of tensors, and writes the results of each.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.jit.mobile

MOBILE: Any = torch.jit.mobile  # without types


def main(model: str, inputs: str, outputs: str) -> None:
    """Write what the model gives for every call."""
    module = MOBILE._load_for_lite_interpreter(model)
    made = []
    with torch.no_grad():
        for call in torch.load(inputs):
            results = module(*call)
            made.append(list(results) if isinstance(results, (tuple, list)) else [results])
    torch.save(made, outputs)
    print(torch.__version__)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:4])
