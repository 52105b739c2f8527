from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calque import ops, passes
from calque.artifact import Limits
from calque.passes import Rewrites
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.fuse_grouped_attention import FuseGroupedAttention
from calque.passes.fuse_rms_norm import FuseRmsNorm
from calque.passes.fuse_rotary import FuseRotary
from calque.states import key_value_states
from calque.traced import TracedModel, user_nodes
from calque.traced_session import TracedSession
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import TYPES, Tiny, prompt, traced, traced_as

Padding = Literal["any", "right", "none"]
grouped = torch.ops.calque.grouped_attention.default
LLAMA16, COHERE16 = Tiny("llama", head_dim=16), Tiny("cohere", head_dim=16, extra={"pad_token_id": 0})
# Scores that the angles' own scale sharpens, and sinks.
GPT_OSS16 = replace(TYPES["gpt_oss"], head_dim=16)
NEOX32 = replace(TYPES["gpt_neox"], hidden=128, head_dim=32)


def ready(model: TracedModel) -> TracedModel:
    passes.run([FuseRotary(), CacheDynamic()], model)
    return model


def joined(model: TracedModel, padding: Padding) -> tuple[Rewrites, list[Any]]:
    """What the checked pass did, and the arguments of the operators that it made."""
    ready(model)
    done = check_pass(FuseGroupedAttention(padding), model, prompt(model))
    return done, [node.args for node in user_nodes(model.graph.nodes, grouped)]


@pytest.mark.parametrize("padding", ["any", "right"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", 2), ("qwen3", 2), ("gemma2", 2), ("gemma3_text", 3), ("phi3", 2), ("phi3-longrope", 2), ("gpt2", 2), ("gpt_neox", 2),
        ("gpt_oss", 2), ("mixtral", 2),
    ],
)  # fmt: skip
def test_every_layer_is_one_operator_with_its_cache(name: str, layers: int, padding: Padding) -> None:
    model = traced(name)
    limits = model.limits
    done, made = joined(model, padding)
    assert (done.count, done.skipped) == (layers, ())
    left = histogram(model)
    assert left["calque.attention.default"] == left["calque.rotary.default"] == left["aten.cat.default"] == 0
    assert [node.op for args in made for node in args[3:5]] == ["placeholder"] * 2 * layers
    assert model.limits == replace(limits, padding=padding, batched_chunk=False, max_length=model.limits.max_length)


def test_attention_of_a_models_own_is_left() -> None:
    model = ready(traced("bloom"))
    assert left_alone(FuseGroupedAttention(), model) == set()
    assert model.limits == Limits()


def test_mask_is_a_bias_for_padding_anywhere_and_made_once_a_kind() -> None:
    model = traced("gemma3_text")
    _, made = joined(model, "any")
    window, whole = torch.ops.calque.mask_bias.default, torch.ops.calque.padding_bias.default
    assert [(args[5].target, args[6]) for args in made] == [(window, None), (whole, None), (window, None)]
    assert made[0][5] is made[2][5]
    assert [args[14] for args in made] == [0, 0, 0]


def test_mask_without_a_window_is_reduced_to_its_padding() -> None:
    model = traced("llama")
    joined(model, "any")
    left = histogram(model)
    assert left["calque.padding_bias.default"] == 1
    assert left["calque.mask_bias.default"] == left["aten.cumsum.default"] == left["aten.le.Tensor"] == 0


@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize(("name", "windows"), [("gemma2", [8, 0]), ("gemma3_text", [8, 0, 8]), ("gpt_oss", [8, 0]), ("mixtral", [8, 8])])
def test_window_stands_at_the_operator_where_no_mask_does(name: str, windows: list[int], padding: Padding) -> None:
    model = traced(name)
    _, made = joined(model, padding)
    assert [args[14] for args in made] == windows
    assert {(args[5], args[6]) for args in made} == {(None, model.placeholders()["attention_mask"])}
    assert histogram(model)["calque.attention_mask.default"] == 0
    assert model.limits.padding == padding


def test_scale_cap_sinks_and_heads_are_the_models() -> None:
    gemma2, gpt_oss = (joined(traced(name), "any")[1] for name in ("gemma2", "gpt_oss"))
    assert {args[9:14] for args in gemma2} == {(None, 4, 2, 24**-0.5, 3.0)}
    assert [args[9].name for args in gpt_oss] == [f"p_model_layers_{i}_self_attn_sinks" for i in range(2)]


def test_flat_heads_are_taken_as_projections_leave_them() -> None:
    model = traced("llama")
    _, made = joined(model, "any")
    assert [part.target for part in made[0][:3]] == [torch.ops.calque.flat_rotary.default] * 2 + [torch.ops.aten.linear.default]
    left = histogram(model)
    assert left["aten.reshape.default"] == left["aten.transpose.int"] == left["calque.join_heads.default"] == 0


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"], ids=["before-heads-move-in-front", "after"])
def test_normed_heads_stay_beside_each_other(name: str) -> None:
    model = traced(name)
    passes.run([FuseRmsNorm()], model)
    joined(model, "any")
    left = histogram(model)
    assert left["calque.flat_rms_norm.default"] == 2 * model.layers
    assert left["calque.join_heads.default"] == left["aten.transpose.int"] == left["aten.reshape.default"] == 0


TABLED: dict[str, tuple[Tiny, int, bool]] = {
    "llama": (LLAMA16, 8, False), "cohere": (COHERE16, 8, True), "phi3": (TYPES["phi3"], 8, False), "gpt_oss": (GPT_OSS16, 8, False),
    "gpt_neox": (NEOX32, 8, False),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLED)
def test_constant_frequencies_become_one_table_by_slot(name: str) -> None:
    tiny, half, interleaved = TABLED[name]
    model = traced_as(tiny)
    _, made = joined(model, "right")
    assert len({args[7:9] for args in made}) == 1
    assert {args[15] for args in made} == {interleaved}
    left = histogram(model)
    assert left["calque.flat_rotary.default"] == left["aten.cos.default"] == left["aten.sin.default"] == 0
    tables = [model.weights[name] for name, node in model.parameters().items() if node in made[0][7:9]]
    assert [table.shape for table in tables] == [(128, half)] * 2
    cos, sin = (table.read() for table in tables)
    squares = cos**2 + sin**2
    torch.testing.assert_close(squares, squares[0, 0].expand(128, half))
    assert model.limits.max_length == 128


NO_TABLE = {
    "head-of-24": TYPES["llama"], "turned-8-of-16": TYPES["gpt_neox"], "frequencies-by-length": TYPES["phi3-longrope"],
    "no-rotation": TYPES["gpt2"],
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TABLE)
def test_other_angles_stay_in_the_graph(name: str) -> None:
    model = traced_as(NO_TABLE[name])
    longest = model.limits.max_length
    done, made = joined(model, "right")
    assert done.count == 2
    assert {args[7:9] for args in made} == {(None, None)}
    assert histogram(model)["calque.flat_rotary.default"] == (0 if name == "no-rotation" else 4)
    assert model.limits.max_length == longest


def test_no_table_is_made_where_padding_may_lie_before_a_rows_tokens() -> None:
    model = traced_as(LLAMA16)
    _, made = joined(model, "any")
    assert {args[7:9] for args in made} == {(None, None)}
    assert model.limits.max_length is None


def test_length_that_the_model_knows_already_stays_where_it_is_shorter() -> None:
    model = traced_as(LLAMA16)
    model.limits = replace(model.limits, max_length=64, recompute_at=32)
    joined(model, "right")
    assert model.limits == Limits(padding="right", batched_chunk=False, max_length=64, recompute_at=32)


def test_model_of_unknown_length_gets_no_table() -> None:
    model = traced_as(LLAMA16)
    model.trained_length = None
    assert {args[7:9] for args in joined(model, "right")[1]} == {(None, None)}


# Rows of tokens: a prompt and the tokens after it, one by one.
PROMPTS, AFTER = [[5, 9, 14, 3, 8, 21, 33, 4, 7, 60, 11], [17, 30, 6, 4]], [[12, 40, 7], [9, 8, 100]]
Feed = dict[str, NDArray[Any]]


def replies(model: TracedModel, rows: list[int], side: str) -> NDArray[Any]:
    """The logits after each row's prompt and each later token, fed together, [steps, rows, V]; padding on ``side``."""
    session, width = TracedSession(model), max(len(PROMPTS[row]) for row in rows)
    sizes = np.array([len(PROMPTS[row]) for row in rows])
    front = width - sizes if side == "left" else 0 * sizes
    slots = np.arange(width)
    mask = ((slots >= front[:, None]) & (slots < (front + sizes)[:, None])).astype(np.int64)
    ids = np.full(mask.shape, 3)
    ids[mask == 1] = np.concatenate([PROMPTS[row] for row in rows])
    start = prompt(model)
    past = {state.input: start[state.input][: len(rows)] for state in model.states}
    places = np.maximum(mask.cumsum(1) - 1, 0)
    out = session("model", {"input_ids": ids, "attention_mask": mask, "position_ids": places, **past})
    answered = [out["logits"][np.arange(len(rows)), front + sizes - 1]]
    for step in range(3):
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        past = {state.input: np.asarray(out[state.output]) for state in model.states}
        ids = np.array([[AFTER[row][step]] for row in rows])
        out = session("model", {"input_ids": ids, "attention_mask": mask, "position_ids": (sizes + step)[:, None], **past})
        answered.append(out["logits"][:, -1])
    return np.stack(answered)


RAGGED: dict[str, Tiny] = {
    "gemma2": TYPES["gemma2"], "gpt_oss": GPT_OSS16, "llama": LLAMA16, "cohere": COHERE16, "gpt2": TYPES["gpt2"],
    "gpt_neox": NEOX32, "phi3-longrope": TYPES["phi3-longrope"],
}  # fmt: skip


@pytest.mark.parametrize(("padding", "side"), [("any", "left"), ("any", "right"), ("right", "right")])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_rows_are_answered_as_if_alone(name: str, padding: Padding, side: str) -> None:
    model = traced_as(RAGGED[name])
    alone = np.concatenate([replies(model, [row], "right") for row in range(2)], 1)
    passes.run_one(FuseGroupedAttention(padding), ready(model))
    together = replies(model, [0, 1], side)
    assert np.abs(together - alone).max() <= 1e-5 * alone.std()


HEADS, GROUPS, WIDTH = 2, 1, 8
NOT_OWN = "its keys and values are not its own cache, grown by its own tokens"
SHARED, AHEAD = "its keys or values are read by other layers too", "its mask does not hide all that comes later"
CHUNKED, OTHERS = "its mask is cut in chunks, which is more than a window", "another layer was left"
SIZES, UNEVEN = "its heads have several sizes: [8, 16]", "its heads have 12 elements, which is no multiple of 8"


@dataclass(frozen=True)
class Layer:
    """An attention, and what it looks at: its own cache, that of the layer before, or no cache at all."""

    kind: str = "causal"
    size: int = 8
    value_size: int = 8
    keys: Literal["own", "shared", "none"] = "own"


class Layers(nn.Module):
    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = layers
        self.query = nn.ModuleList(nn.Linear(WIDTH, HEADS * layer.size, bias=False) for layer in layers)
        self.key = nn.ModuleList(nn.Linear(WIDTH, GROUPS * layer.size, bias=False) for layer in layers)
        self.value = nn.ModuleList(nn.Linear(WIDTH, GROUPS * layer.value_size, bias=False) for layer in layers)
        self.out = nn.ModuleList(nn.Linear(HEADS * layer.value_size, WIDTH, bias=False) for layer in layers)

    def forward(self, x: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor]:
        batch, new, held = *x.shape[:2], list(past)
        key_mask, before = attention_mask.bool(), past[0].shape[2]
        key = value = x
        for i, layer in enumerate(self.layers):
            query = self.query[i](x).view(batch, new, HEADS, -1).transpose(1, 2)
            if layer.keys != "shared":
                key = self.key[i](x).view(batch, new, GROUPS, -1).transpose(1, 2)
                value = self.value[i](x).view(batch, new, GROUPS, -1).transpose(1, 2)
            if layer.keys == "own":
                whole_key = torch.ops.calque.cache_update(held.pop(0), key, f"{i}.key")
                whole_value = torch.ops.calque.cache_update(held.pop(0), value, f"{i}.value")
            keys, values = (key, value) if layer.keys == "none" else (whole_key, whole_value)
            mask = None
            if layer.kind != "none":
                full = ops.visible(key_mask, before, new, before + new, layer.kind, 3)
                mask = torch.ops.calque.attention_mask(full, key_mask, layer.kind, 3)
            seen = torch.ops.calque.attention(query, keys, values, mask, 0.5, 0.0, None, True)
            x = x + self.out[i](seen.transpose(1, 2).reshape(batch, new, -1))
        return (x,)


def layers(*given: Layer) -> tuple[TracedModel, Feed]:
    """The trace of those layers with its states settled, and inputs for it with a past of two."""
    owners = [(i, layer) for i, layer in enumerate(given) if layer.keys == "own"]
    states = tuple(state for i, layer in owners for state in key_value_states(i, GROUPS, layer.size, layer.value_size, None))
    generator = torch.Generator().manual_seed(9)
    inputs = {"x": torch.randn(2, 3, WIDTH, generator=generator), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    inputs |= {state.input: torch.randn(2, GROUPS, 2, int(state.shape[3]), generator=generator) for state in states}
    axes = {"x": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "past+sequence"}}
    model = small(Layers(given), inputs, axes | {state.input: {0: "batch", 2: "past"} for state in states}, states)
    passes.run_one(CacheDynamic(), model)
    return model, arrays(inputs)


LEFT: list[tuple[Padding, Layer, str]] = [
    ("any", Layer(value_size=16), SIZES), ("right", Layer(value_size=16), SIZES), ("any", Layer(kind="bidirectional"), AHEAD),
    ("any", Layer(size=12, value_size=12), UNEVEN), ("right", Layer(kind="chunked"), CHUNKED), ("none", Layer(kind="chunked"), CHUNKED),
]  # fmt: skip


@pytest.mark.parametrize(("padding", "layer", "reason"), LEFT)
def test_layer_that_the_operator_cannot_be_is_left_and_the_reason_given(padding: Padding, layer: Layer, reason: str) -> None:
    model, _ = layers(layer)
    assert left_alone(FuseGroupedAttention(padding), model) == {reason}
    assert model.limits == Limits()


def test_layer_without_a_mask_is_left_and_the_reason_given() -> None:
    model, _ = layers(Layer(kind="none"))
    assert left_alone(FuseGroupedAttention(), model) == {AHEAD}


def test_layers_that_share_keys_are_left_and_the_reason_given() -> None:
    model, _ = layers(Layer(), Layer(keys="shared"))
    assert left_alone(FuseGroupedAttention(), model) == {SHARED}


def test_layer_that_looks_past_its_cache_is_left_and_the_reason_given() -> None:
    model, _ = layers(Layer(), Layer(kind="none", keys="none"))
    done = passes.run_one(FuseGroupedAttention(), model)
    assert (done.count, {reason for _, reason in done.skipped}) == (1, {NOT_OWN})


@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_every_mask_that_hides_what_comes_later_is_a_bias(kind: str) -> None:
    model, inputs = layers(Layer(kind=kind))
    assert check_pass(FuseGroupedAttention(), model, inputs).count == 1


@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_cache_without_padding_is_continued_alike(kind: str) -> None:
    model, inputs = layers(Layer(kind=kind), Layer())
    assert check_pass(FuseGroupedAttention("right"), model, inputs).count == 2


def test_some_layers_are_joined_where_padding_lies_anywhere() -> None:
    model, inputs = layers(Layer(), Layer(value_size=16))
    done = check_pass(FuseGroupedAttention(), model, inputs)
    assert (done.count, {reason for _, reason in done.skipped}) == (1, {SIZES})
    assert model.limits == Limits(batched_chunk=False)


@pytest.mark.parametrize("padding", ["right", "none"])
def test_no_layer_is_joined_where_one_keeps_gaps_in_its_cache(padding: Padding) -> None:
    model, _ = layers(Layer(), Layer(kind="chunked"))
    assert left_alone(FuseGroupedAttention(padding), model) == {CHUNKED, OTHERS}
    assert model.limits == Limits()
