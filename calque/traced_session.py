"""Runs a traced graph as it stands, at any stage of the conversion, behind the same names as the artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter, Node

from calque.artifact import NUM_LOGITS_TO_KEEP
from calque.errors import UsageError
from calque.tensors import to_array, to_tensor
from calque.traced import TracedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from calque.session import Arrays


class _Recorder(Interpreter):
    """Keeps what each ``calque::cache_update`` gave, which before a cache pass no output does."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.updates: dict[str, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Return the node's value."""
        value = super().run_node(n)
        if n.target is torch.ops.calque.cache_update.default:
            self.updates[str(n.args[2])] = value
        return value


class TracedSession:
    """A session over the graph itself, in ``torch.fx``: every weight is read and held, so for small models.

    ``check`` refuses inputs past the limits of an artifact that the graph stands in for.
    """

    def __init__(self, model: TracedModel, check: Callable[[Arrays], None] | None = None) -> None:
        self.model, self.check = model, check
        self.bound = model.bind()

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return logits and presents by name, [B, S, V] and [B, H, P + S, D].

        Raises:
            UsageError: an input is missing.
        """
        if missing := [spec.name for spec in self.model.inputs if spec.name not in inputs]:
            raise UsageError("inputs are missing", missing)
        if self.check:
            self.check(inputs)
        # An early stage has its states in float32, whatever the artifact carries them in.
        feeds = [to_tensor(inputs[spec.name].copy()).to(getattr(torch, spec.dtype)) for spec in self.model.inputs]
        recorder = _Recorder(self.model.module)
        with torch.no_grad():
            values = recorder.run(*self.bound, *feeds)
        outputs = {spec.name: value for spec, value in zip(self.model.outputs, values, strict=True)}
        if not self.model.settled:
            outputs |= {state.output: recorder.updates[state.name] for state in self.model.states}
        if NUM_LOGITS_TO_KEEP in inputs and NUM_LOGITS_TO_KEEP not in {spec.name for spec in self.model.inputs}:
            outputs["logits"] = outputs["logits"][:, -int(inputs[NUM_LOGITS_TO_KEEP]) :]
        return {name: to_array(value) for name, value in outputs.items()}
