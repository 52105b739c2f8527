"""The fused operators in ONNX Runtime, as they are lowered to, against what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calque import ops
from calque.targets import _to_onnx
from calque.targets._contrib import CONTRIB
from calque.targets._standard import STANDARD, Table
from calque.traced import TracedModel
from tests.passes.small_graphs import arrays, small

calque = torch.ops.calque
SIZE, HEADS, GROUPS = 16, 4, 2
TABLES = pytest.mark.parametrize("table", [STANDARD, CONTRIB], ids=["standard", "contrib"])


def session(model: TracedModel, table: Table) -> ort.InferenceSession:
    assert _to_onnx.problems(model, table) == []
    data = ir.to_proto(_to_onnx.to_onnx(model, table)).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check(function: Callable[..., Any], sizes: list[dict[str, Tensor]], axes: dict[str, dict[int, str]], table: Table) -> None:
    """The lowering of a function gives what its reference does, for inputs of every size."""
    runs = session(small(Calls(function), sizes[0], axes), table)
    for inputs in sizes:
        expected = function(*inputs.values())
        for got, wanted in zip(runs.run(None, arrays(inputs)), [expected] if isinstance(expected, Tensor) else expected, strict=True):
            assert got.shape == tuple(wanted.shape)
            np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-5, atol=2e-5)


class Calls(nn.Module):
    """One call of a function of up to three tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, ...]:
        found = self.function(*[given for given in (a, b, c) if given is not None])
        return (found,) if isinstance(found, Tensor) else tuple(found)


WEIGHT, BIAS = draw(SIZE, seed=2), draw(SIZE, seed=3)
NORMS: dict[str, Callable[..., Any]] = {
    "rms": lambda x, y: calque.rms_norm(x * y, WEIGHT, 1e-2),
    "rms-without-weight": lambda x, y: calque.rms_norm(x * y, None, 1e-2),
    "add-rms": lambda x, y: calque.add_rms_norm(x, y, WEIGHT, 1e-2),
    "add-layer": lambda x, y: calque.add_layer_norm(x, y, WEIGHT, BIAS, 1e-2),
    "add-layer-without-bias": lambda x, y: calque.add_layer_norm(x, y, WEIGHT, None, 1e-2),
    "silu": lambda x, y: torch.nn.functional.silu(x + y),
    "quick-gelu": lambda x, y: calque.quick_gelu(x + y, 1.702),
}


@TABLES
@pytest.mark.parametrize("name", NORMS)
def test_norm_equals_its_reference(name: str, table: Table) -> None:
    axes = {name: {0: "batch", 1: "sequence"} for name in ("x", "y")}
    sizes = [{"x": draw(*size, SIZE), "y": draw(*size, SIZE, seed=5)} for size in ((2, 3), (1, 1), (3, 7))]
    check(NORMS[name], sizes, axes, table)


@TABLES
def test_norm_of_heads_equals_its_reference(table: Table) -> None:
    axes = {"x": {0: "batch", 1: "sequence"}}
    sizes = [{"x": draw(*size, HEADS, SIZE)} for size in ((2, 3), (1, 1))]
    check(lambda x: calque.rms_norm(x, WEIGHT, 1e-5), sizes, axes, table)


@pytest.mark.parametrize("weight", [WEIGHT, draw(HEADS * SIZE, seed=7), None], ids=["of-all", "of-each", "none"])
def test_norm_of_heads_beside_each_other_equals_its_reference(weight: Tensor | None) -> None:
    sizes = [{"x": draw(*size, HEADS * SIZE)} for size in ((2, 3), (1, 1))]
    check(lambda x: calque.flat_rms_norm(x, weight, 1e-2, HEADS), sizes, {"x": {0: "batch", 1: "sequence"}}, CONTRIB)


@TABLES
@pytest.mark.parametrize("bias", [None, draw(5)], ids=["without-bias", "with-bias"])
def test_product_with_a_weight_as_it_is_stored_equals_its_reference(bias: Tensor | None, table: Table) -> None:
    weight = draw(5, SIZE)
    check(
        lambda x: torch.nn.functional.linear(x + 1, weight, bias),
        [{"x": draw(*size, SIZE)} for size in ((2, 3), (1, 1))], {"x": {0: "batch", 1: "sequence"}}, table,
    )  # fmt: skip


@TABLES
def test_pieces_of_a_split_equal_their_reference(table: Table) -> None:
    sizes = [{"x": draw(*size, 10)} for size in ((2, 3), (1, 1))]
    axes = {"x": {0: "batch", 1: "sequence"}}
    check(lambda x: (*(x + 1).split([6, 3, 1], 2), *(x + 1).split(4, -1), (x + 1).split([10], 2)[0]), sizes, axes, table)


@pytest.mark.parametrize("turned", [16, 8, 4])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("flat", [False, True], ids=["heads-in-front", "flat"])
def test_rotation_equals_its_reference(flat: bool, interleaved: bool, turned: int) -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if flat:
            return calque.flat_rotary(x, cos, sin, interleaved, turned, HEADS)
        return calque.rotary(x, cos, sin, interleaved, turned)

    sizes = []
    for batch, sequence in ((2, 3), (1, 1), (3, 6)):
        x = draw(batch, sequence, HEADS * SIZE) if flat else draw(batch, HEADS, sequence, SIZE)
        sizes.append({"x": x, "cos": draw(batch, sequence, turned // 2), "sin": draw(batch, sequence, turned // 2, seed=4)})
    rows = {0: "batch", 1: "sequence"}
    check(function, sizes, {"x": rows if flat else {0: "batch", 2: "sequence"}, "cos": rows, "sin": rows}, STANDARD)


def test_heads_are_split_and_joined_alike() -> None:
    def function(x: Tensor) -> Any:
        apart = calque.split_heads(x, HEADS)
        return apart, calque.join_heads(apart.flip(2))

    check(function, [{"x": draw(2, 3, HEADS * 4)}, {"x": draw(1, 1, HEADS * 4)}], {"x": {0: "batch", 1: "sequence"}}, STANDARD)


def test_bias_of_a_mask_equals_its_reference() -> None:
    sizes = [{"x": draw(2, 1, 3, 5)}, {"x": draw(1, 1, 1, 2)}]
    axes = {"x": {0: "batch", 2: "queries", 3: "keys"}}
    check(lambda x: calque.mask_bias(x > 0), sizes, axes, STANDARD)


def test_bias_of_padding_equals_its_reference() -> None:
    sizes = [{"x": draw(2, 5), "queries": draw(2, 3)}, {"x": draw(1, 2), "queries": draw(1, 1)}]
    axes = {"x": {0: "batch", 1: "keys"}, "queries": {0: "batch", 1: "queries"}}
    check(lambda x, queries: calque.padding_bias(x > 0, queries), sizes, axes, STANDARD)


@dataclass(frozen=True)
class Kind:
    """How an attention is told to attend; ``turned`` elements by its own tables of angles."""

    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    packed: bool = False
    turned: int = 0
    interleaved: bool = False
    kv_heads: int = GROUPS
    size: int = SIZE


SINKS, LONGEST = draw(HEADS, seed=6), 32
SLOTS = torch.arange(LONGEST)[:, None]


class Attention(nn.Module):
    """Grouped attention of new tokens over a cache: with a bias made of the mask, or by how many tokens a row holds."""

    def __init__(self, kind: Kind, gaps: bool) -> None:
        super().__init__()
        self.kind, self.gaps = kind, gaps

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        kind = self.kind
        bias = cos = sin = None
        if self.gaps and kind.window:
            bias = calque.mask_bias(ops.visible(mask.bool(), past_key.shape[2], q.shape[1], mask.shape[1], "sliding", kind.window))
        elif self.gaps:
            bias = calque.padding_bias(mask.bool(), q)
        if kind.turned:
            angles = SLOTS * 0.7 ** torch.arange(kind.turned // 2)
            cos, sin = angles.cos(), angles.sin()
        given = (torch.cat([q, k, v], 2), None, None) if kind.packed else (q, k, v)
        made: tuple[Tensor, ...] = calque.grouped_attention(
            *given, past_key, past_value, bias, None if self.gaps else mask, cos, sin, SINKS if kind.sinks else None, HEADS, kind.kv_heads,
            0.4, kind.softcap, 0 if self.gaps else kind.window, kind.interleaved,
        )  # fmt: skip
        return made


BOTH: dict[str, Kind] = {
    "plain": Kind(), "window": Kind(window=3), "cap": Kind(softcap=1.5), "sinks": Kind(sinks=True), "packed": Kind(packed=True),
    "every-head-its-own": Kind(kv_heads=HEADS), "one-key": Kind(kv_heads=1), "small-heads": Kind(size=8),
    "all": Kind(window=3, softcap=1.5, sinks=True, packed=True),
}  # fmt: skip
TURNED: dict[str, Kind] = {
    "turned": Kind(turned=16), "interleaved": Kind(turned=16, interleaved=True), "partial": Kind(turned=16, size=32),
    "interleaved-partial": Kind(turned=16, size=32, interleaved=True), "turned-window": Kind(turned=16, window=3, sinks=True),
    "turned-packed": Kind(turned=16, packed=True, softcap=1.5),
}  # fmt: skip
# The masks of calls that follow each other, and how many tokens of each are new.
LEFT_PADDED = [
    [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    [[0, 0, 1, 1, 1, 1, 1], [1] * 7],
    [[0, 0] + [1] * 6, [1] * 8],
]
RIGHT_PADDED = [
    [[1, 1, 1, 0, 0], [1] * 5],
    [[1, 1, 1, 0, 0, 1], [1] * 6],
    [[1, 1, 1, 0, 0, 1, 1], [1] * 7],
    [[1, 1, 1, 0, 0, 1, 1, 1], [1] * 8],
]
ONE_ROW = [[[1, 1, 1]], [[1] * 7], [[1] * 8]]


def call(kind: Kind, new: int, mask: Tensor, past: tuple[Tensor, Tensor], seed: int) -> dict[str, Tensor]:
    batch = mask.shape[0]
    q = draw(batch, new, HEADS * kind.size, seed=seed)
    k, v = (draw(batch, new, kind.kv_heads * kind.size, seed=seed + i) for i in (1, 2))
    return {"q": q, "k": k, "v": v, "mask": mask, "past_key": past[0], "past_value": past[1]}


@cache
def opened(kind: Kind, gaps: bool) -> ort.InferenceSession:
    """The attention lowered, once for all calls."""
    new, held = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    axes = {"q": new, "k": new, "v": new, "mask": {0: "batch", 1: "past+sequence"}, "past_key": held, "past_value": held}
    past = draw(2, kind.kv_heads, 2, kind.size)
    example = call(kind, 3, torch.ones(2, 5, dtype=torch.int64), (past, past.clone()), 1)
    return session(small(Attention(kind, gaps), example, axes), CONTRIB)


def chained(kind: Kind, gaps: bool, masks: list[list[list[int]]]) -> None:
    """Every call over the cache that the one before gave has the output of the reference at each token, and its cache."""
    empty = torch.zeros(len(masks[0]), kind.kv_heads, 0, kind.size)
    ours = theirs = (empty, empty)
    before = 0
    for step, rows in enumerate(masks):
        mask = torch.tensor(rows)
        inputs = call(kind, mask.shape[1] - before, mask, ours, 10 * step)
        out, *kept = Attention(kind, gaps)(*inputs.values())
        ours = (kept[0], kept[1])
        got = opened(kind, gaps).run(None, arrays(inputs | dict(zip(("past_key", "past_value"), theirs, strict=True))))
        theirs = (torch.from_numpy(got[1]), torch.from_numpy(got[2]))
        real = mask[:, before:].bool().numpy()
        near(got[0][real], out.numpy()[real])
        for whole, wanted in zip(theirs, ours, strict=True):
            assert whole.shape == wanted.shape
            for row, tokens in enumerate(mask.sum(1)):
                # A row's tokens lie where the mask says, or fill its slots from the first.
                slots = mask[row].bool() if gaps else torch.arange(mask.shape[1]) < tokens
                near(whole[row][:, slots].numpy(), wanted[row][:, slots].numpy())
        before = mask.shape[1]


def near(got: NDArray[Any], wanted: NDArray[Any]) -> None:
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("masks", [LEFT_PADDED, RIGHT_PADDED, ONE_ROW], ids=["left", "right", "one-row"])
@pytest.mark.parametrize("name", BOTH)
def test_attention_with_a_bias_equals_its_reference_over_calls(name: str, masks: list[list[list[int]]]) -> None:
    chained(BOTH[name], True, masks)


@pytest.mark.parametrize("masks", [RIGHT_PADDED, ONE_ROW], ids=["ragged", "one-row"])
@pytest.mark.parametrize("name", BOTH | TURNED)
def test_attention_by_held_tokens_equals_its_reference_over_calls(name: str, masks: list[list[list[int]]]) -> None:
    chained((BOTH | TURNED)[name], False, masks)
