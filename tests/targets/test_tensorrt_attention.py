"""Attention, slots and rotary embeddings that TensorRT gets wrong or refuses: each is named, and TensorRT is heard on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from calque.targets._tensorrt_attention import fused
from calque.targets._tensorrt_legality import illegal
from tests.tensorrt_graphs import BF16, BOOL, F16, F32, I8, I32, I64, Sketch, given, held, said, single

SLOTS = 64


def rules(model: ir.Model, longest: int = 0) -> list[str]:
    return [problem.why.partition(":")[0] for problem in illegal(model, longest)]


def attend(
    size: int = 32, dtype: ir.DataType = F16, value: int = 0, masked: bool = True, extra: Any = (), outputs: int = 1, **attributes: Any
) -> ir.Model:
    """Attention over as many keys as queries."""
    q, k, v = given("q", dtype, "B", 4, "S", size), given("k", dtype, "B", 2, "S", size), given("v", dtype, "B", 2, "S", value or size)
    mask = given("mask", BOOL, "B", 1, "S", "S") if masked else None
    sketch = Sketch()
    sketch.add("Attention", q, k, v, mask, *extra, outputs=outputs, **{"scale": 0.5, **attributes})
    if outputs == 4:
        for present in sketch.nodes[0].outputs[1:3]:
            present.name = ""
    return sketch.model(*(output for output in sketch.nodes[0].outputs if output.name), dtype=dtype)


def cached(kind: str = "Attention", rest: Any = (), slots: int | str = SLOTS, dtype: ir.DataType = F16, domain: str = "",
           write: dict[str, Any] | None = None, lent: bool = True, returned: bool = True, **attributes: Any) -> ir.Model:  # fmt: skip
    """Attention whose keys and values lie in slots; ``rest``: what it reads beside queries, keys and values."""
    sketch, indices = Sketch(), given("write_indices", I64, "B")
    full = []
    for name in "kv":
        past: ir.Value = given(f"past_{name}", dtype, "B", 2, slots, 32)
        if not lent:
            past = sketch.add("Add", past, held([0.0], dtype))
        full.append(sketch.add("TensorScatter", past, given(name, dtype, "B", 2, "S", 32), indices, **(write or {"axis": -2})))
    q = given("q", F16, "B", 4, "S", 32)
    if dtype != F16:
        return sketch.model(*full, dtype=dtype)
    out = sketch.add(kind, q, *full, *(part(sketch) if callable(part) else part for part in rest), domain=domain, **attributes)
    return sketch.model(out, *(full if returned else ()))


def mask() -> ir.Value:
    return given("mask", BOOL, "B", 1, "S", SLOTS)


def lengths(sketch: Sketch) -> ir.Value:
    """How many slots each row fills, computed."""
    past = next(node for node in sketch.nodes if node.op_type == "TensorScatter")
    new = sketch.add("Shape", past.inputs[1], start=2, end=3)
    return sketch.add("Cast", sketch.add("Add", past.inputs[2], new), to=int(I32))


SCALED: dict[str, Any] = {"scale": 0.5}
LOWER: dict[str, Any] = {"domain": "trt", "causal_kind": "lower_right"}
RIGHT: dict[str, Callable[[], ir.Model]] = {
    "attention": attend,
    "attention in bfloat16": lambda: attend(dtype=BF16),
    "attention without a mask": lambda: attend(size=20, masked=False),
    "attention of as many keys as queries that is causal": lambda: attend(masked=False, is_causal=1),
    "float32 that may be decomposed": lambda: attend(dtype=F32, TRT_decomposable=1),
    "slots": lambda: cached(rest=(mask(),), **SCALED),
    "slots and lengths": lambda: cached("TRT_Attention", (None, None, lengths), **LOWER),
    "rotary": lambda: single("RotaryEmbedding", given("x", F16, "B", 2, "S", 16), *(given(n, F16, "B", "S", 8) for n in ("cos", "sin"))),
    "top": lambda: single("TopK", given("x", F16, "B", 5000), held([3840], I64), outputs=2),
}
# What TensorRT makes of it, the rule, and the graph.
WRONG: dict[str, tuple[str, str, Callable[[], ir.Model]]] = {
    "nonpad_kv_seqlen": ("taken", "attention-lengths", lambda: attend(extra=(None, None, given("n", I64, "B")))),
    "nonpad_kv_seqlen over slots": (
        "taken", "attention-lengths", lambda: cached(rest=(mask(), None, None, given("n", I64, "B")), **SCALED)),
    "causal over slots": ("taken", "attention-causal", lambda: cached(is_causal=1, **SCALED)),
    "upper left over slots": ("taken", "attention-causal", lambda: cached("TRT_Attention", domain="trt", causal_kind="upper_left")),
    "TRT_Attention's scale": ("taken", "attention-ignored", lambda: cached("TRT_Attention", (None, None, lengths), **LOWER, scale=0.5)),
    "TRT_Attention's is_causal": (
        "taken", "attention-ignored", lambda: cached("TRT_Attention", (None, None, lengths), domain="trt", is_causal=1)),
    "lengths in another place": ("taken", "attention-lengths", lambda: cached("TRT_Attention", (None, None, None, None, lengths), **LOWER)),
    "a mask beside lower_right": ("refused", "attention-mask", lambda: cached("TRT_Attention", (mask(),), **LOWER)),
    "a mask beside is_causal": ("refused", "attention-mask", lambda: attend(is_causal=1)),
    "past keys": ("refused", "attention-past", lambda: attend(masked=False, extra=[given(n, F16, "B", 2, "N", 32) for n in ("pk", "pv")])),
    "present keys": ("refused", "attention-past", lambda: attend(outputs=3)),
    "scores": ("refused", "attention-scores", lambda: attend(outputs=4)),
    "softcap": ("refused", "attention-softcap", lambda: attend(softcap=30.0)),
    "softmax_precision": ("refused", "attention-precision", lambda: attend(softmax_precision=1)),
    "float32": ("failed", "attention-kernel", lambda: attend(dtype=F32)),
    "heads of 20": ("failed", "attention-kernel", lambda: attend(size=20)),
    "heads of 512": ("failed", "attention-kernel", lambda: attend(size=512)),
    "values of another size": ("refused", "attention-kernel", lambda: attend(size=64, value=32)),
    "slots that are no input": ("failed", "slots-input", lambda: cached(rest=(mask(),), lent=False, **SCALED)),
    "slots that are no output": ("failed", "slots-output", lambda: cached(rest=(mask(),), returned=False, **SCALED)),
    "slots of int8": ("refused", "slots-type", lambda: cached(dtype=I8)),
    "a ring": ("refused", "slots-mode", lambda: cached(rest=(mask(),), write={"axis": -2, "mode": "circular"}, **SCALED)),
    "another axis": ("refused", "slots-axis", lambda: cached(rest=(mask(),), write={"axis": 1}, **SCALED)),
    "slots without a number": ("refused", "slots-axis", lambda: cached(rest=(mask(),), slots="N", **SCALED)),
    "a table for one row": ("refused", "rotary-batch", lambda: single(
        "RotaryEmbedding", given("x", F16, "B", 2, "S", 16), *(given(n, F16, 1, "S", 8) for n in ("cos", "sin")))),
    "a table in float32": ("refused", "mixed-types", lambda: single(
        "RotaryEmbedding", given("x", F16, "B", 2, "S", 16), *(given(n, F32, "B", "S", 8) for n in ("cos", "sin")))),
    "too many": ("failed", "topk", lambda: single("TopK", given("x", F16, "B", 5000), held([4000], I64), outputs=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_left_alone_and_builds(name: str) -> None:
    model = RIGHT[name]()
    assert illegal(model) == []
    assert said(model)[0] == "taken"


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_name(name: str) -> None:
    _, rule, make = WRONG[name]
    assert set(rules(make())) == {rule}


@pytest.mark.parametrize("name", WRONG)
def test_tensorrt_takes_it_or_says_so_late(name: str) -> None:
    answer, _, make = WRONG[name]
    assert said(make())[0] == answer


def test_a_call_longer_than_the_slots_is_refused() -> None:
    model = cached(rest=(mask(),), **SCALED)
    assert rules(model, SLOTS) == []
    assert rules(model, SLOTS + 1) == ["slots-overflow"] * 2
    answer, lines = said(model, {"B": 2, "S": SLOTS + 1})
    assert (answer, "not self-consistent" in lines) == ("taken", True)  # a warning alone


def test_shapes_follow_beyond_tensorrt_s_own_attention() -> None:
    sketch, domain = Sketch(), "trt"
    q, k, v = (given(name, F16, "B", heads, "S", 32) for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    turned = sketch.add("TRT_Attention", q, k, v, domain=domain, causal_kind="lower_right")
    out = sketch.add("RotaryEmbedding", turned, *(given(name, F16, 1, "S", 16) for name in ("cos", "sin")))
    model = sketch.model(out)
    assert rules(model) == ["rotary-batch"]
    model.opset_imports.pop(domain)  # as torch.onnx leaves it
    assert rules(model) == ["rotary-batch"]


def test_lengths_arrive_in_the_right_place_alone() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    arrived = []
    for place in (2, 4):
        model = cached("TRT_Attention", (*[None] * place, lengths), **LOWER)
        log = trt.Logger(trt.Logger.ERROR)
        network = trt.Builder(log).create_network(0)
        parser = trt.OnnxParser(network, log)
        assert parser.parse(ir.to_proto(model).SerializeToString())
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        arrived += [layer.num_inputs for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert arrived == [7, 3]  # queries, keys, values, mask, two unused, lengths; or no more than the first three


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("size", [7, 8, 9, 16, 24, 36, 64, 80, 250, 256, 264])
def test_heads_that_have_a_kernel_build_and_no_others(size: int, hidden: bool) -> None:
    assert said(attend(size=size, masked=hidden))[0] == ("taken" if fused(size, size, F16, hidden) else "failed")
    assert not fused(size, size, F32, hidden)
    assert not fused(size, size + 8, F16, hidden)
