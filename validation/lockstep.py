"""Several conversations with one session at a time, so that what is costly to open is opened once for a call of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.generic]]
    # The graph, its inputs, and where the outputs go.
    _Waiting = tuple[str, Arrays, Future[Arrays]]

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class RunsEach(Protocol):
    """A session that answers several calls better together than one after the other."""

    def check(self, graph: str, inputs: Arrays) -> None:
        """Leave quietly if the call may be made."""
        ...

    def run_each(self, graph: str, calls: Sequence[Arrays]) -> Sequence[Arrays]:
        """Return the outputs of each call."""
        ...


@dataclass
class Lockstep:
    """Gathers one call of each conversation that still goes on, and runs them together."""

    session: RunsEach
    going: int = 0
    waiting: list[_Waiting] = field(default_factory=list)
    broken: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return the outputs of a call, once every other conversation has made one or is over."""
        self.session.check(graph, inputs)
        answer: Future[Arrays] = Future()
        with self.changed:
            if self.broken:
                raise self.broken
            self.waiting.append((graph, inputs, answer))
            self.changed.notify()
        return dict(answer.result())

    def all(self, work: Callable[[T], R], conversations: Sequence[T]) -> list[R]:
        """Return what ``work`` makes of each conversation; all are held at once, each in a thread of its own."""
        if not conversations:
            return []
        self.going = len(conversations)
        with ThreadPoolExecutor(self.going) as threads:
            futures = [threads.submit(self._one, work, conversation) for conversation in conversations]
            try:
                self._answer_all()
            except BaseException as error:  # those who wait are told, or they would wait for ever
                with self.changed:
                    self.broken = error
                    for _, _, answer in self.waiting:
                        answer.set_exception(error)
                raise
            return [future.result() for future in futures]

    def _answer_all(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: len(self.waiting) == self.going)
                calls = list(self.waiting)
            if not calls:
                return
            self._answer(calls)

    def _one(self, work: Callable[[T], R], conversation: T) -> R:
        try:
            return work(conversation)
        finally:
            with self.changed:
                self.going -= 1
                self.changed.notify()

    def _answer(self, calls: Sequence[_Waiting]) -> None:
        for graph in dict.fromkeys(graph for graph, _, _ in calls):
            asked = [call for call in calls if call[0] == graph]
            found: list[Arrays | Exception]
            try:
                found = [*self.session.run_each(graph, [inputs for _, inputs, _ in asked])]
            except Exception as error:  # a session is foreign code; each conversation says that it failed
                found = [error] * len(asked)
            for call in asked:
                self._give(call, found.pop(0))

    def _give(self, call: _Waiting, outputs: Arrays | Exception) -> None:
        """Let one conversation go on until it asks again or is over: one judges its answer at a time, as that takes memory."""
        with self.changed:
            self.waiting = [other for other in self.waiting if other is not call]
            if isinstance(outputs, Exception):
                call[2].set_exception(outputs)
            else:
                call[2].set_result(outputs)
            self.changed.wait_for(lambda: len(self.waiting) == self.going)
