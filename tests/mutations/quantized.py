"""Faults that integers in the place of weights can have: in what is packed, in their scales and zero points, in what was left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calque.traced import TracedModel, user_nodes
from calque.weights import Derived, Weight

packed_linear = torch.ops.calque.packed_linear.default
# The output projection of a layer: not stacked, not tied, and in every model.
PACKED, SCALE, ZERO = 1, 2, 3


def _entry(model: TracedModel, argument: int, product: int) -> str:
    """The name of what a product with integers reads; the first products are those of layer 0, the last is the head."""
    names = {node: name for name, node in model.parameters().items()}
    return names[user_nodes(model.graph.nodes, packed_linear)[product].args[argument]]  # type: ignore[index]


def _change(model: TracedModel, argument: int, change: Callable[[Tensor], Tensor], product: int = 1) -> None:
    """What is read there is what ``change`` makes of it."""
    name = _entry(model, argument, product)
    weight = model.weights[name]
    model.weights.entries[name] = Derived((weight,), "fault", change, _dtype(weight), tuple(weight.shape), moved=False)


def _dtype(weight: Weight) -> str:
    assert isinstance(weight, Derived)
    return weight.dtype


def zero_point_off_by_one(model: TracedModel) -> None:
    """Every integer of one product stands for one step more."""
    bits = user_nodes(model.graph.nodes, packed_linear)[1].args[5]
    ones = 1 if bits == 8 else 17
    _change(model, PACKED, lambda packed: torch.where(packed >= 255 - ones, packed, packed + ones))


def zero_points_ignored(model: TracedModel) -> None:
    """Asymmetric integers are read as symmetric ones."""
    for node in user_nodes(model.graph.nodes, packed_linear):
        node.args = (*node.args[:ZERO], None, *node.args[ZERO + 1 :])


def groups_transposed(model: TracedModel) -> None:
    """Scales lie group by group, not row by row."""
    _change(model, SCALE, lambda scale: scale.t().reshape(scale.shape))


def scale_of_the_neighbour_group(model: TracedModel) -> None:
    """Each group has the scale of the one beside it."""
    _change(model, SCALE, lambda scale: scale.roll(1, 1))


def scale_of_the_row_above(model: TracedModel) -> None:
    """Each output has the scales of the one before it."""
    _change(model, SCALE, lambda scale: scale.roll(1, 0))


def one_scale_wrong(model: TracedModel) -> None:
    """One group of one output has a scale 10 % too large."""

    def wrong(scale: Tensor) -> Tensor:
        changed = scale.clone()
        changed[3, 0] *= 1.1
        return changed

    _change(model, SCALE, wrong)


def nibbles_swapped(model: TracedModel) -> None:
    """Of two integers in a byte the first is taken from the high half."""
    _change(model, PACKED, lambda packed: (packed >> 4) | (packed << 4))


def groups_swapped(model: TracedModel) -> None:
    """The first two groups of each row of integers change places."""
    _change(model, PACKED, lambda packed: torch.cat([packed[:, 1:2], packed[:, :1], packed[:, 2:]], 1))


def rows_of_two_weights_stacked_wrongly(model: TracedModel) -> None:
    """The product of queries, keys and values has its rows one place too far."""
    _change(model, PACKED, lambda packed: packed.roll(1, 0), product=0)


def signed_as_unsigned(model: TracedModel) -> None:
    """Integers are packed as they are, though what reads them takes half the range off."""
    bits = user_nodes(model.graph.nodes, packed_linear)[1].args[5]
    _change(model, PACKED, lambda packed: packed ^ (128 if bits == 8 else 0x88))


FAULTS: tuple[Callable[[TracedModel], None], ...] = (
    zero_point_off_by_one, groups_transposed, scale_of_the_neighbour_group, scale_of_the_row_above, one_scale_wrong, nibbles_swapped,
    groups_swapped, rows_of_two_weights_stacked_wrongly, signed_as_unsigned,
)  # fmt: skip

# What a plan can do otherwise than the reference, whose integers are those of the plan as it was meant.
PLANS: dict[str, dict[str, object]] = {
    "head left out": {"head": "keep", "embedding": "keep"},
    "search left out": {"search": False},
    "groups of another size": {"group": 32},
    "one weight left out": {"overrides": {"*.1.*down_proj.weight": "keep", "*.1.mlp.c_proj.weight": "keep"}},
    "one weight of other bits": {"overrides": {"*.1.*o_proj.weight": "int8", "*.1.attn.c_proj.weight": "int8"}},
}


def broken(fault: Callable[[TracedModel], None], whole: TracedModel) -> TracedModel:
    """A copy of the packed model with the fault in it."""
    copied = whole.copy()
    fault(copied)
    copied.finish_rewrite()
    return copied
