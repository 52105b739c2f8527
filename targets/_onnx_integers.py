"""The integers that an ONNX file holds, read back as the passes made them: signed, [out, in], with their scales."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.packing import unpack
from calque.tensors import to_array, to_tensor

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Matrix = tuple[NDArray[np.int8], NDArray[np.generic]]

# Parameters of integers are called NAME.q and their scales NAME.scale, with a word more for each way in which a pass laid them out.
INTEGERS = re.compile(r"(?P<weight>.+)\.q(?P<laid>(\.\w+)*)")
TRANSPOSED, PACKED = "transposed", "packed"


def integers(file: Path) -> dict[str, Matrix]:
    """Return q int8 [out, in] and scale [out, groups] of every matrix of integers in the file, by the name of its weight.

    Those of experts, many matrices in one parameter, are left out.
    """
    import onnx_ir as ir

    weights = ir.load(file).graph.initializers
    scales = {name.rpartition(".scale")[0]: name for name in weights if ".scale" in name}
    found: dict[str, Matrix] = {}
    for name, value in weights.items():
        match = INTEGERS.fullmatch(name)
        if not match or match["weight"] not in scales or value.const_value is None:
            continue
        laid, scale_name = match["laid"].split("."), scales[match["weight"]]
        scale = _read(weights[scale_name])
        q = _unpacked(value, scale.shape[1]) if PACKED in laid else _read(value)
        if q is None or q.ndim != 2:
            continue
        q = q.T if TRANSPOSED in laid else q
        scale = scale.T if TRANSPOSED in scale_name.split(".") else scale
        found[match["weight"]] = np.ascontiguousarray(q, dtype=np.int8), np.ascontiguousarray(scale.reshape(q.shape[0], -1))
    return found


def _read(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _unpacked(value: ir.Value, groups: int) -> NDArray[Any] | None:
    """Return the integers of bytes, of which what reads them knows how many are in one; None where no product or lookup does."""
    reader = next((use.node for use in value.uses() if "block_size" in use.node.attributes and "bits" in use.node.attributes), None)
    if reader is None:
        return None
    count = groups * reader.attributes["block_size"].as_int()
    packed = _read(value)
    return to_array(unpack(to_tensor(packed.reshape(packed.shape[0], -1)), reader.attributes["bits"].as_int(), count))
