"""The untouched eager model without its weights in memory: each is read where the model's own code uses it, and dropped after.

Parameters are one NaN seen as a tensor of the right shape. Every function of torch that is given one gets the weight in its
place, so what the model computes is what it would with all of them; what slipped past would turn its outputs into NaN, which the
proof refuses. Large products are computed some rows of their weight at a time, and of tables the rows that are looked up are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from calque.weights import PIECE_BYTES, Weight, pieces

if TYPE_CHECKING:
    from torch import Tensor


class WeightsWhenUsed(TorchFunctionMode):
    """Gives torch's functions weights in place of the parameters that stand for them; ``weights`` by the id of those."""

    def __init__(self, weights: Mapping[int, Weight]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; shapes and types are those of the stand-ins, values never."""
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "__get__":
            return function(*args, **kwargs)
        if function in (functional.linear, torch._C._nn.linear) and self._large(_given(args, kwargs, 1, "weight")):
            return self._linear(_given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "weight"), _given(args, kwargs, 2, "bias"))
        if function is functional.embedding and self._of(_given(args, kwargs, 1, "weight")) is not None:
            return self._embedding(_given(args, kwargs, 0, "input"), _given(args, kwargs, 1, "weight"))
        return function(*(self._real(value) for value in args), **{name: self._real(value) for name, value in kwargs.items()})

    def _of(self, value: Any) -> Weight | None:
        return self.weights.get(id(value)) if isinstance(value, torch.nn.Parameter) else None

    def _real(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            made = [self._real(part) for part in value]
            return type(value)(made) if type(value) in (list, tuple) else value
        weight = self._of(value)
        return value if weight is None else weight.read()

    def _large(self, parameter: Any) -> bool:
        weight = self._of(parameter)
        return weight is not None and weight.by_rows and math.prod(weight.shape) * torch.float32.itemsize > PIECE_BYTES

    def _linear(self, value: Tensor, parameter: Any, bias: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            parts = [functional.linear(value, rows) for rows in pieces(self.weights[id(parameter)])]
            product = torch.cat(parts, -1)
            return product if bias is None else product + self._real(bias)

    def _embedding(self, ids: Tensor, parameter: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            weight = self.weights[id(parameter)]
            if not weight.by_rows:
                return functional.embedding(ids, weight.read())
            found, places = torch.unique(ids, return_inverse=True)
            return torch.cat([weight.read_rows(row, row + 1) for row in found.tolist()])[places]


def _given(args: Any, kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def streamed(model: torch.nn.Module, weights: Mapping[str, Weight]) -> torch.nn.Module:
    """Return the model, built without weights, with each read where it is used; buffers that ``weights`` names are read now.

    A large embedding must be an ordinary one: the lookup has no norm, and says nothing of how often it was made.
    """
    stand_ins: dict[int, torch.nn.Parameter] = {}
    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in stand_ins:
                nan = torch.full((), math.nan, dtype=parameter.dtype)
                stand_ins[id(parameter)] = torch.nn.Parameter(nan.expand(parameter.shape), requires_grad=False)
                stand_ins[id(stand_ins[id(parameter)])] = stand_ins[id(parameter)]
            module._parameters[name] = stand_ins[id(parameter)]
            found[id(stand_ins[id(parameter)])] = weights[f"{prefix}.{name}" if prefix else name]
        for name, buffer in module._buffers.items():
            held = weights.get(f"{prefix}.{name}" if prefix else name)
            if held is not None and buffer is not None:
                module._buffers[name] = held.read().to(buffer.dtype)
    mode = WeightsWhenUsed(found)
    using = ExitStack()
    model.register_forward_pre_hook(lambda *_: _entered(using, mode))
    model.register_forward_hook(lambda *_: using.close(), always_call=True)
    return model


def _entered(using: ExitStack, mode: WeightsWhenUsed) -> None:
    """Use the mode until ``using`` is closed; what a hook returns would replace the model's inputs."""
    using.enter_context(mode)
