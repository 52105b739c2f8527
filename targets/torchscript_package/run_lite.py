"""Runs a ``.ptl`` in the lite interpreter of the torch that is installed: standard library and torch, 2.1 or any other.

``run_lite.py model.ptl inputs.pt outputs.pt`` reads a list of calls, each a list of tensors, and writes the results of each.
"""

import sys
import warnings

import torch
from torch.jit.mobile import _load_for_lite_interpreter


def main(model, inputs, outputs):
    """Write what the model gives for every call."""
    module = _load_for_lite_interpreter(model)
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
