"""Calls on a GPU as CUDA graphs: what is asked for a second time with the same shapes is recorded, and replayed from then on.

A step of a static cache has the same shapes each time, so that a generator records one graph and launches nothing but that. Written
against torch's own interface; no GPU has run it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Shapes = tuple[tuple[int, ...], ...]

# Runs before a graph is recorded: what a kernel allocates or tunes at its first calls belongs to none.
WARM_UP = 3


@dataclass(frozen=True)
class Recorded:
    """A graph, the memory that it reads and the memory that it writes."""

    graph: Any
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]


class CudaGraphs:
    """Calls ``run`` with tensors on the GPU, whatever it is given; shapes that were met before are replayed."""

    def __init__(self, run: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
        self._run = run
        self._met: set[Shapes] = set()
        self._recorded: dict[Shapes, Recorded] = {}

    def __call__(self, given: list[Tensor]) -> list[Tensor]:
        """Return the results, copies that the next call leaves alone."""
        shapes = tuple(tuple(tensor.shape) for tensor in given)
        if shapes in self._recorded:
            recorded = self._recorded[shapes]
            for held, tensor in zip(recorded.inputs, given, strict=True):
                held.copy_(tensor)
            recorded.graph.replay()
            return [tensor.clone() for tensor in recorded.outputs]
        moved = [tensor.cuda() for tensor in given]
        if shapes in self._met:
            self._recorded[shapes] = self._record(moved)
            return self(given)
        self._met.add(shapes)
        return list(self._run(moved))

    def _record(self, inputs: list[Tensor]) -> Recorded:
        import torch

        cuda: Any = torch.cuda  # of which torch's types know not everything
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):
            for _ in range(WARM_UP):
                self._run(inputs)
        cuda.current_stream().wait_stream(aside)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            outputs = self._run(inputs)
        return Recorded(graph, inputs, outputs)
