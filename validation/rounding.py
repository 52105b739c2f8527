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
    from collections.abc import Callable

    import torch

    Rounding = Callable[[torch.Tensor], torch.Tensor]

# Two roundings of one value, the runtime's and this one, may fall to different sides.
FACTOR = 2.0


@contextmanager
def rounded_activations(model: torch.nn.Module, rounding: Mapping[str, Rounding]) -> Iterator[None]:
    """Round what the layers read whose weights are named, while the block runs; lookups read no values."""
    import torch

    def before(rounded: Rounding, _: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(given[0]), *given[1:])

    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in rounding}
    hooks = [
        owner.register_forward_pre_hook(partial(before, rounding[name]))
        for name, owner in owners.items()
        if not isinstance(owner, torch.nn.Embedding)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
