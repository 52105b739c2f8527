"""Quantized values that TensorRT gets wrong or refuses: each is named, and TensorRT is heard on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from calque.targets._tensorrt_legality import illegal
from tests.tensorrt_graphs import F16, F32, I8, I64, U8, Sketch, given, held, said

INT4, UINT4, E4M3, E5M2 = ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2
FNUZ = ir.DataType.FLOAT8E4M3FNUZ


def activation(codes: ir.DataType = I8, zero: int | None = 0, scale: Any = 0.1, **attributes: Any) -> ir.Model:
    """Values quantized and dequantized."""
    sketch = Sketch()
    parts = [scale if isinstance(scale, ir.Value) else held(scale), *([] if zero is None else [held(zero, codes)])]
    told: dict[str, Any] = {"output_dtype": int(codes)} if zero is None else {}
    made = sketch.add("QuantizeLinear", given("x", F16, "B", 8, 16), *parts, **attributes, **told)
    made.dtype = codes
    return sketch.model(sketch.add("DequantizeLinear", made, *parts, **attributes))


def weight(
    codes: ir.DataType = I8,
    shape: tuple[int, int] = (16, 4),
    scale: Any = 0.1,
    zero: Any = None,
    scaled: ir.DataType = F16,
    **attributes: Any,
) -> ir.Model:
    """A product with a weight that is dequantized."""
    sketch = Sketch()
    zeros = [] if zero is None else [held(zero, codes)]
    numbers = sketch.add("DequantizeLinear", held(np.ones(shape), codes), held(scale, scaled), *zeros, **attributes)
    return sketch.model(sketch.add("MatMul", given("x", F16, "B", 8, shape[0]), numbers))


def read_otherwise(kind: str, *rest: ir.Value, **attributes: Any) -> ir.Model:
    """Codes that another node reads before they are dequantized."""
    sketch = Sketch()
    moved = sketch.add(kind, held(np.ones((16, 4)), I8), *rest, **attributes)
    moved.dtype = I8
    return sketch.model(sketch.add("DequantizeLinear", moved, held(0.1)))


def three_axes(axis: int) -> ir.Model:
    sketch = Sketch()
    scales = [4, 32, 16]
    scales[axis] //= 2
    numbers = sketch.add("DequantizeLinear", held(np.ones((4, 32, 16)), I8), held(np.full(scales, 0.1)), axis=axis, block_size=2)
    return sketch.model(sketch.add("MatMul", given("x", F16, "B", 8, 32), numbers))


BLOCKS: dict[str, Any] = {"axis": 0, "block_size": 16, "scale": np.full((1, 4), 0.1)}
ROWS = np.full(16, 0.1)
RIGHT: dict[str, Callable[[], ir.Model]] = {
    "int8": activation,
    "int8 without zero points": lambda: activation(zero=None),
    "float8": lambda: activation(E4M3),
    "a weight by channel": lambda: weight(scale=np.full(4, 0.1), axis=1),
    "a weight with zero points of 0": lambda: weight(scale=np.full(4, 0.1), zero=np.zeros(4), axis=1),
    "int4 by block": lambda: weight(INT4, **BLOCKS),
    "a float8 weight": lambda: weight(E4M3),
    "blocks along the last axis but one": lambda: three_axes(1),
}
# What TensorRT makes of it, the rule, and the graph.
WRONG: dict[str, tuple[str, str, Callable[[], ir.Model]]] = {
    "uint8, whose zero is that of int8": ("taken", "quantized-type", lambda: activation(U8)),
    "by channel of an activation": ("taken", "quantized-channels", lambda: activation(zero=None, scale=ROWS, axis=2)),
    "a scale that is computed": ("taken", "quantized-scale", lambda: activation(scale=given("s", F16))),
    "a zero point that is not 0": ("refused", "quantized-zero-point", lambda: activation(zero=3)),
    "a weight with zero points": ("refused", "quantized-zero-point", lambda: weight(scale=np.full(4, 0.1), zero=np.ones(4), axis=1)),
    "uint4": ("refused", "quantized-type", lambda: weight(UINT4, **BLOCKS)),
    "float8 of five bits": ("refused", "quantized-type", lambda: weight(E5M2)),
    "float8 without a negative zero": ("refused", "quantized-type", lambda: weight(FNUZ)),
    "an odd count of 4 bits": ("failed", "quantized-odd", lambda: weight(INT4, (15, 3), np.full((1, 3), 0.1), axis=0, block_size=15)),
    "blocks along an outer axis": ("refused", "quantized-blocks", lambda: three_axes(0)),
    "numbers of another type": ("refused", "mixed-types", lambda: weight(scale=np.full(4, 0.1), scaled=F32, axis=1)),
    "codes that are looked up": ("failed", "quantized-constant", lambda: read_otherwise("Gather", given("ids", I64, "B"))),
    "codes that are turned": ("failed", "quantized-constant", lambda: read_otherwise("Transpose", perm=[1, 0])),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_left_alone_and_builds(name: str) -> None:
    model = RIGHT[name]()
    assert illegal(model) == []
    assert said(model)[0] == "taken"


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_name(name: str) -> None:
    _, rule, make = WRONG[name]
    assert {problem.why.partition(":")[0] for problem in illegal(make())} == {rule}


@pytest.mark.parametrize("name", WRONG)
def test_tensorrt_takes_it_or_says_so_late(name: str) -> None:
    answer, _, make = WRONG[name]
    assert said(make())[0] == answer


def test_of_uint8_tensorrt_says_no_more_than_a_warning() -> None:
    assert "UINT8 zero_point only on DLA" in said(activation(U8))[1]


def test_zero_points_that_are_no_constant_are_refused_unread() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    lazy = ir.Value(name="z", const_value=ir.LazyTensor(read, dtype=I8, shape=ir.Shape([4]), name="z"), type=ir.TensorType(I8))
    sketch = Sketch()
    numbers = sketch.add("DequantizeLinear", held(np.ones((16, 4)), I8), held(np.full(4, 0.1)), lazy, axis=1)
    model = sketch.model(sketch.add("MatMul", given("x", F16, "B", 8, 16), numbers))
    assert [problem.why.partition(":")[0] for problem in illegal(model)] == ["quantized-zero-point"]
