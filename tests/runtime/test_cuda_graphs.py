"""What is recorded and what is replayed, on stand-ins for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from calque.runtime.cuda_graphs import WARM_UP, CudaGraphs

RUNS: list[str] = []


class Graph:
    """Replays what was run while it recorded, on the same memory."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.work: Any = None

    def replay(self) -> None:
        RUNS.append("replay")
        self.work()


class Stream:
    def wait_stream(self, other: Stream) -> None:
        """Stand in for a wait."""


@contextmanager
def recording(graph: Graph) -> Iterator[None]:
    Graph.recording = graph
    yield
    Graph.recording = None


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    RUNS.clear()
    stand_ins: dict[str, Any] = {"Stream": Stream, "current_stream": Stream, "stream": on, "CUDAGraph": Graph, "graph": recording}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)

    def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
        RUNS.append("run")
        out = torch.empty_like(given[0])

        def work() -> None:
            torch.add(given[0], given[1], out=out)

        work()
        if Graph.recording:
            Graph.recording.work = work
        return [out]

    return CudaGraphs(run)


def pair(length: int, value: float) -> list[torch.Tensor]:
    return [torch.full((length,), float(value)), torch.ones(length)]


def test_shapes_that_come_again_are_recorded_once_and_replayed(calls: CudaGraphs) -> None:
    assert [calls(pair(3, value))[0].tolist() for value in (1, 2, 3)] == [[2] * 3, [3] * 3, [4] * 3]
    assert ["run", *["run"] * (WARM_UP + 1), "replay", "replay"] == RUNS


def test_other_shapes_are_run_as_they_come(calls: CudaGraphs) -> None:
    assert [len(calls(pair(length, 1))[0]) for length in (3, 4, 5)] == [3, 4, 5]
    assert RUNS == ["run"] * 3


def test_a_result_outlives_the_next_call(calls: CudaGraphs) -> None:
    results = [calls(pair(2, value))[0] for value in (1, 2, 3, 4)]
    assert [result.tolist() for result in results] == [[2, 2], [3, 3], [4, 4], [5, 5]]
