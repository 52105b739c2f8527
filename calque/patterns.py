"""Looking at a traced graph from the results backwards, for the passes that recognise what is written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.fx import Node

aten = torch.ops.aten


def calls(value: Any, target: Any) -> bool:
    """Return whether a node's argument is itself the result of calling ``target``."""
    return bool(getattr(value, "op", "") == "call_function" and value.target is target)


def orders(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the two arguments of a product or sum both ways round."""
    yield node.args[0], node.args[1]
    yield node.args[1], node.args[0]


def factors(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the factors of a product both ways round; nothing if the argument is no product."""
    if calls(value, aten.mul.Tensor):
        yield from orders(value)


def wave(value: Any) -> tuple[Any, Any, float] | None:
    """Return cosine or sine, what it is taken of, and the number that multiplies it; None if the argument is neither."""
    scale = 1.0
    if calls(value, aten.mul.Tensor) and isinstance(value.args[1], float):
        value, scale = value.args
    if not calls(value, aten.cos.default) and not calls(value, aten.sin.default):
        return None
    return value.target, value.args[0], scale


def mean_of(value: Any) -> Any:
    """Return what the argument is the mean of, over the last axis, which it keeps; None if it is not."""
    return value.args[0] if calls(value, aten.mean.dim) and list(value.args[1]) == [-1] and value.args[2:3] == (True,) else None


def square_of(value: Any) -> Any:
    """Return what the argument is the square of; None if it is not."""
    if calls(value, aten.pow.Tensor_Scalar) and value.args[1] == 2:
        return value.args[0]
    return value.args[0] if calls(value, aten.mul.Tensor) and value.args[0] is value.args[1] else None


def only_user(node: Node) -> Node | None:
    """Return the one node that reads ``node``; None if there are others, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None
