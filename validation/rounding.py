"""The eager model with what its products read rounded to 8 bits: how far that alone moves its outputs.

An artifact whose runtime rounds activations can agree with the eager model no closer than this. What it does besides is
found by the same artifact without rounding, to the limits of float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Two roundings of one value, the runtime's and this one, may fall to different sides.
FACTOR = 2.0
LARGEST = 127


def round_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return the values as 8 bits hold them, each block of the last axis with a scale of its own, the largest being 127.

    Source: ``QuantizeARow`` of MLAS in onnxruntime@1.31, which MatMulNBits calls where its accuracy level is 4.
    """
    import torch

    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / LARGEST
    return (torch.where(scale > 0, blocks / scale, 0.0).round() * scale).reshape(x.shape)


@contextmanager
def rounded_activations(model: torch.nn.Module, blocks: Mapping[str, int]) -> Iterator[None]:
    """Round what the layers read whose weights are named, while the block runs; lookups read no values."""
    import torch

    def before(block: int, _: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_blocks(given[0], block), *given[1:])

    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in blocks}
    hooks = [
        owner.register_forward_pre_hook(partial(before, blocks[name]))
        for name, owner in owners.items()
        if not isinstance(owner, torch.nn.Embedding)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
