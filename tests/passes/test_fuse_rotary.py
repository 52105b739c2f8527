from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calque.passes.fuse_rotary import FuseRotary
from calque.traced import TracedModel, user_nodes
from tests.passes.check_pass import check_pass, histogram
from tests.passes.small_graphs import arrays, left_alone, small
from tests.tiny_models import Tiny, prompt, traced, traced_as

rotary, flat_rotary = torch.ops.calque.rotary.default, torch.ops.calque.flat_rotary.default
NO_ROW, OWN_WAY = "the angles are not one row per batch and position", "the angles are laid out in a way of their own"
HALF = 4


def turned(model: TracedModel) -> set[tuple[Any, ...]]:
    """Whether the rotations of a graph are interleaved, and of how many elements."""
    return {node.args[3:] for node in user_nodes(model.graph.nodes, rotary)}


@pytest.mark.parametrize(
    ("name", "rotations", "size"),
    [
        ("llama", 4, 24), ("qwen3", 4, 24), ("gemma2", 4, 24), ("gemma3_text", 6, 24), ("phi3", 4, 16), ("phi3-longrope", 4, 16),
        ("gpt_neox", 4, 8), ("gpt_oss", 4, 24), ("mixtral", 4, 24),
    ],
)  # fmt: skip
def test_every_rotation_of_a_model_is_one_operator(name: str, rotations: int, size: int) -> None:
    model = traced(name)
    done = check_pass(FuseRotary(), model, prompt(model))
    assert (done.count, done.skipped) == (rotations, ())
    assert turned(model) == {(False, size)}
    assert histogram(model)["aten.neg.default"] == 0


@pytest.mark.parametrize(("name", "size"), [("cohere", 24), ("glm", 12)])
def test_interleaved_rotation_of_a_model_is_one_operator(name: str, size: int) -> None:
    model = traced_as(Tiny(name, extra={"pad_token_id": 0}))
    done = check_pass(FuseRotary(), model, prompt(model))
    assert (done.count, done.skipped) == (4, ())
    assert turned(model) == {(True, size)}
    assert histogram(model)["aten.repeat_interleave.self_int"] == 0


def test_heads_of_gptj_are_turned_where_they_lie() -> None:
    model = traced_as(Tiny("gptj", extra={"rotary_dim": 8}))
    done = check_pass(FuseRotary(), model, prompt(model))
    assert (done.count, done.skipped) == (4, ())
    assert {node.args[3:] for node in user_nodes(model.graph.nodes, flat_rotary)} == {(True, 8, 4)}


def test_rotation_by_complex_numbers_is_left() -> None:
    assert left_alone(FuseRotary(), traced_as(Tiny("llama4_text", extra=LLAMA4))) == set()


LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 8}


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_model_without_rotation_is_left_alone(name: str) -> None:
    assert left_alone(FuseRotary(), traced(name)) == set()


@pytest.mark.parametrize(("name", "waves"), [("llama", 1), ("gemma3_text", 2)])
def test_angles_are_made_once_in_half_their_size(name: str, waves: int) -> None:
    model = traced(name)
    check_pass(FuseRotary(), model, prompt(model))
    for wave in (torch.ops.aten.cos.default, torch.ops.aten.sin.default):
        nodes = user_nodes(model.graph.nodes, wave)
        assert [node.meta["val"].shape[-1] for node in nodes] == [12] * waves
    assert histogram(model)["aten.cat.default"] == 0


@pytest.mark.parametrize("length", [5, 40])
def test_frequencies_still_depend_on_the_length(length: int) -> None:
    model = traced("phi3-longrope")
    check_pass(FuseRotary(), model, prompt(model, length))
    (cos,) = {node.args[1] for node in user_nodes(model.graph.nodes, rotary)}
    assert cos.target is torch.ops.aten.where.self  # type: ignore[union-attr]


class Turn(nn.Module):
    """``form`` of a rotation, by the positions of each row or by those of none."""

    def __init__(self, form: Callable[..., Tensor], rows: bool = True) -> None:
        super().__init__()
        self.form, self.rows = form, rows

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        counted = positions if self.rows else torch.arange(positions.shape[1])[None]
        return self.form(x, counted[:, :, None].float() * 0.3 ** torch.arange(HALF))


def twice(f: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([f, f], -1)
    return both.cos()[:, None], both.sin()[:, None]


def side_by_side(f: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.repeat_interleave(f, 2, -1)
    return (both.cos() * 1.5)[:, None], (both.sin() * 1.5)[:, None]


def halves(x: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    return torch.cat([-x[..., size:], x[..., :size]], -1)


def chunked_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def turn(x: Tensor, angles: tuple[Tensor, Tensor], quarter: Callable[[Tensor], Tensor]) -> Tensor:
    return x * angles[0] + quarter(x) * angles[1]


def by_parts(x: Tensor, f: Tensor) -> Tensor:
    (a, b), cos, sin = x.chunk(2, -1), f.cos()[:, None], f.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def by_pairs(x: Tensor, f: Tensor) -> Tensor:
    a, b, cos, sin = x[..., ::2], x[..., 1::2], f.cos()[:, None], f.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def cut_and_doubled(x: Tensor, f: Tensor) -> Tensor:
    cos, sin = (wave[..., :HALF].repeat_interleave(2, -1) for wave in twice(f))
    return turn(x, (cos, sin), pairs)


def partly(x: Tensor, f: Tensor) -> Tensor:
    return torch.cat([turn(x[..., : 2 * HALF], twice(f), halves), x[..., 2 * HALF :]], -1)


def partly_by_pairs(x: Tensor, f: Tensor) -> Tensor:
    return torch.cat([by_pairs(x[..., : 2 * HALF], f), x[..., 2 * HALF :]], -1)


def swapped(x: Tensor, f: Tensor) -> Tensor:
    cos, sin = twice(f)
    return turn(x, (sin, cos), halves)


# The form, the size of a head, and whether pairs lie beside each other.
FORMS: dict[str, tuple[Callable[..., Tensor], int, bool]] = {
    "halves": (lambda x, f: turn(x, twice(f), halves), 8, False),
    "turned-first": (lambda x, f: halves(x) * twice(f)[1] + twice(f)[0] * x, 8, False),
    "chunked": (lambda x, f: turn(x, twice(f), chunked_halves), 8, False),
    "parts": (by_parts, 8, False),
    "partial": (partly, 12, False),
    "interleaved": (lambda x, f: turn(x, side_by_side(f), pairs), 8, True),
    "interleaved-parts": (by_pairs, 8, True),
    "interleaved-of-halved-angles": (cut_and_doubled, 8, True),
    "interleaved-partial": (partly_by_pairs, 12, True),
    # Turned by other angles, but turned.
    "cos-and-sin-swapped": (swapped, 8, False),
}


def given(size: int = 2 * HALF) -> dict[str, Tensor]:
    x = torch.randn(2, 3, 5, size, generator=torch.Generator().manual_seed(6))
    return {"x": x, "positions": torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])}


def graph(form: Callable[..., Tensor], size: int = 2 * HALF, rows: bool = True) -> TracedModel:
    return small(Turn(form, rows), given(size), {"x": {0: "batch", 2: "sequence"}, "positions": {0: "batch", 1: "sequence"}})


@pytest.mark.parametrize("name", FORMS)
def test_written_form_is_one_operator(name: str) -> None:
    form, size, interleaved = FORMS[name]
    model = graph(form, size)
    done = check_pass(FuseRotary(), model, arrays(given(size)))
    assert (done.count, done.skipped) == (1, ())
    (fused,) = user_nodes(model.graph.nodes, rotary)
    assert fused.args[3:] == (interleaved, 2 * HALF)
    assert fused.args[1].meta["val"].shape[-1] == HALF  # type: ignore[union-attr]
    assert list(fused.users) == [model.output_node()]


class Behind(nn.Module):
    """Interleaved rotation of heads that are not in front yet."""

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        cos, sin = (torch.repeat_interleave(wave[:, :, None, :], 2, 3) for wave in (f.cos(), f.sin()))
        return turn(x, (cos, sin), pairs)


def test_heads_behind_the_sequence_are_turned_flat() -> None:
    x, positions = given().values()
    inputs = {"x": x.transpose(1, 2).contiguous(), "f": positions[:, :, None] * 0.3 ** torch.arange(HALF)}
    model = small(Behind(), inputs, {"x": {0: "batch", 1: "sequence"}, "f": {0: "batch", 1: "sequence"}})
    assert check_pass(FuseRotary(), model, arrays(inputs)).count == 1
    (fused,) = user_nodes(model.graph.nodes, flat_rotary)
    assert fused.args[3:] == (True, 2 * HALF, 3)


def in_both_layouts(x: Tensor, f: Tensor) -> Tensor:
    angles = twice(f)
    return turn(x, angles, halves) + turn(x, angles, pairs)


def test_angles_of_both_layouts_are_told_apart() -> None:
    # The second turns pairs by angles that are laid out for halves, which no operator does.
    model = graph(in_both_layouts)
    done = check_pass(FuseRotary(), model, arrays(given()))
    assert done.count == 1
    assert {reason for _, reason in done.skipped} == {OWN_WAY}
    assert turned(model) == {(False, 2 * HALF)}


def flipped(x: Tensor) -> Tensor:
    return torch.cat([x[..., HALF:], -x[..., :HALF]], -1)


def unturned(x: Tensor) -> Tensor:
    return torch.cat([-x[..., :HALF], x[..., HALF:]], -1)


def uneven(x: Tensor) -> Tensor:
    return torch.cat([-x[..., 3:], x[..., :3]], -1)


def along_the_sequence(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -2).flatten(-2)


def crossed(x: Tensor, f: Tensor) -> Tensor:
    (a, b), cos, sin = x.chunk(2, -1), f.cos()[:, None], f.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * sin + a * cos], -1)


def turned_back(x: Tensor, f: Tensor) -> Tensor:
    (a, b), cos, sin = x.chunk(2, -1), f.cos()[:, None], f.sin()[:, None]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def parts_swapped(x: Tensor, f: Tensor) -> Tensor:
    (a, b), cos, sin = x.chunk(2, -1), f.cos()[:, None], f.sin()[:, None]
    return torch.cat([b * cos + a * sin, a * cos - b * sin], -1)


def few_pairs(x: Tensor, f: Tensor) -> Tensor:
    a, b, cos, sin = x[..., 0 : 2 * HALF : 2], x[..., 1 : 2 * HALF : 2], f.cos()[:, None], f.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def two_frequencies(x: Tensor, f: Tensor) -> Tensor:
    both = torch.cat([f, 2 * f], -1)
    return turn(x, (both.cos()[:, None], both.sin()[:, None]), halves)


NEARLY: dict[str, tuple[Callable[..., Tensor], int, set[str]]] = {
    "sign-flipped": (lambda x, f: turn(x, twice(f), flipped), 8, set()),
    "halves-in-place": (lambda x, f: turn(x, twice(f), unturned), 8, set()),
    "uneven-parts": (lambda x, f: turn(x, twice(f), uneven), 8, set()),
    "pairs-apart": (lambda x, f: turn(x, side_by_side(f), along_the_sequence), 8, set()),
    "another-value": (lambda x, f: x * twice(f)[0] + halves(x * 2) * twice(f)[1], 8, set()),
    "difference": (lambda x, f: x * twice(f)[0] - halves(x) * twice(f)[1], 8, set()),
    "cos-and-sin-crossed": (crossed, 8, set()),
    "turned-back": (turned_back, 8, set()),
    "parts-swapped": (parts_swapped, 8, set()),
    "some-pairs-of-a-head": (few_pairs, 12, set()),
    "two-frequencies": (two_frequencies, 8, {OWN_WAY}),
    "angles-of-the-other-layout": (lambda x, f: turn(x, twice(f), pairs), 8, {OWN_WAY}),
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_a_rotation_is_left_alone(name: str) -> None:
    form, size, reasons = NEARLY[name]
    assert left_alone(FuseRotary(), graph(form, size)) == reasons


def test_angles_that_all_rows_share_are_left_and_the_reason_given() -> None:
    assert left_alone(FuseRotary(), graph(FORMS["halves"][0], rows=False)) == {NO_ROW}


def test_part_of_the_rest_stays_beside_the_turned_part() -> None:
    model = graph(lambda x, f: torch.cat([turn(x[..., :8], twice(f), halves), x[..., 8:10]], -1), size=12)
    assert check_pass(FuseRotary(), model, arrays(given(12))).count == 1
    assert histogram(model)["aten.cat.default"] == 1
