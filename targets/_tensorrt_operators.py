"""Which ONNX operators TensorRT's parser knows: a table that was got by asking it, so that none need be installed to read it.

::

    python -m calque.targets._tensorrt_operators     asks the installed parser, TensorRT-RTX's, and writes the table anew

The parser is asked by name: what it knows it may still refuse for its types or attributes, which the rules of
``_tensorrt_legality`` say. A test holds the table equal to what the installed parser answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

FILE = Path(__file__).with_suffix(".json")
PARSER = "tensorrt_rtx"
OPSET = 24
# Operators of TensorRT's own, of any domain. Source: onnx-tensorrt, docs/TRT_custom_ops.md of 11.1.
OWN = (
    "TRT_Attention",
    "TRT_KVCacheUpdate",
    "TRT_MoE",
    "TRT_QuantizedAttention",
    "TRT_BlockDequantize",
    "TRT_BlockQuantize",
    "TRT_DynamicQuantize",
    "TRT_FP4DynamicQuantize",
    "TRT_FP8DequantizeLinear",
    "TRT_FP8QuantizeLinear",
    "TRT_INT4DequantizeLinear",
    "TRT_INT4QuantizeLinear",
    "TRT_MXFP8DequantizeLinear",
    "TRT_MXFP8DynamicQuantize",
    "TRT_MXFP8QuantizeLinear",
)


@cache
def supported() -> Mapping[str, bool]:
    """Return whether the parser knows each operator of the standard, and of TensorRT's own, by name."""
    operators: dict[str, bool] = json.loads(FILE.read_text(encoding="utf-8"))["operators"]
    return MappingProxyType(operators)


@cache
def opset() -> int:
    """Return the last opset that the table speaks of."""
    last: int = json.loads(FILE.read_text(encoding="utf-8"))["opset"]
    return last


def ask() -> dict[str, Any]:
    """Return the table as the installed parser answers it now, with what it and its questions come from.

    Raises:
        ImportError: TensorRT-RTX is not installed.
    """
    import onnx

    trt = import_module(PARSER)

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    return {
        "parser": PARSER,
        "version": trt.__version__,
        "onnx": version("onnx"),
        "opset": OPSET,
        "operators": {name: bool(parser.supports_operator(name)) for name in (*sorted(known), *OWN)},
    }


def main() -> None:
    """Write the table anew."""
    FILE.write_text(json.dumps(ask(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
