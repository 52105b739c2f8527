"""The arguments of a call as TorchScript reads them: of the type that the operator's schema says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

SMALLEST = -(2**63)


class Inexpressible(Exception):
    """A node that has no line of TorchScript: why, and what to do about it."""

    def __init__(self, why: str, fix: str = "use a model without it") -> None:
        self.fix = fix
        super().__init__(why)


def number(value: Any) -> str:
    """Return a constant as TorchScript writes it.

    Raises:
        Inexpressible: it is of no type that TorchScript has constants of.
    """
    if value is None or isinstance(value, bool | str):
        return repr(value)
    if isinstance(value, int):
        return f"({SMALLEST + 1} - 1)" if value == SMALLEST else repr(value)
    if isinstance(value, float):
        return f'float("{value}")' if math.isinf(value) or math.isnan(value) else repr(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    raise Inexpressible(f"{value!r} is a {type(value).__name__}, of which TorchScript has no constants")


def argument(value: Any, kind: Any, named: Callable[[Any], str]) -> str:
    """Return an argument of the type ``kind`` of a schema; ``named`` says what nodes are called."""
    while kind.kind() == "OptionalType":
        kind = kind.getElementType()
    if isinstance(value, list | tuple):
        return _list(value, kind, named)
    if isinstance(value, Node):
        return named(value)
    if kind.kind() == "FloatType" and isinstance(value, int) and not isinstance(value, bool):
        return number(float(value))
    if kind.kind() == "BoolType" and isinstance(value, int):
        return number(bool(value))
    if kind.kind() == "IntType" and isinstance(value, bool):
        return number(int(value))
    return number(value)


def _list(values: list[Any] | tuple[Any, ...], kind: Any, named: Callable[[Any], str]) -> str:
    """Return a list whose type its elements would not say: an empty one, or one of tensors of which some are not there."""
    if kind.kind() != "ListType":
        raise Inexpressible(f"a list where one value of the type {kind} is expected")
    element = kind.getElementType()
    written = f"[{', '.join(argument(value, element, named) for value in values)}]"
    types = {"TensorType": "Tensor", "IntType": "int", "FloatType": "float", "BoolType": "bool", "NumberType": "number"}
    if element.kind() == "OptionalType":
        return f"torch.jit.annotate(List[Optional[Tensor]], {written})"
    return written if values else f"torch.jit.annotate(List[{types.get(element.kind(), 'int')}], [])"
