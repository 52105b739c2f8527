"""One trace for all conversions of a checkpoint in a process, for tests of what comes after tracing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pytest

from calque import converters

if TYPE_CHECKING:
    from calque.source import ModelSource
    from calque.tasks import Task
    from calque.traced import TracedModel

_TRACES: dict[Hashable, TracedModel] = {}
_load = converters.load


def shared() -> AbstractContextManager[None]:
    """Inside it conversions get a copy of the trace of their checkpoint, which is made once a process."""
    return _loading(_load_shared)


def own_traces() -> AbstractContextManager[None]:
    """Inside it conversions trace for themselves after all: new nodes of a copied graph have other names, which a file holds."""
    return _loading(_load)


@contextmanager
def _loading(load: Callable[[Task], Callable[[ModelSource], TracedModel]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converters, "load", load)
        yield


def _load_shared(task: Task) -> Callable[[ModelSource], TracedModel]:
    trace = _load(task)

    def once(source: ModelSource) -> TracedModel:
        key = (task, *_content(source))
        if key not in _TRACES:
            _TRACES[key] = trace(source)
        return _TRACES[key].copy()

    return once


def _content(source: ModelSource) -> tuple[Hashable, ...]:
    """Return what a trace depends on. Files that were written anew are others, though they have the same name."""
    tensors = tuple(sorted((name, repr(stored)) for name, stored in source.tensors.items()))
    files = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.folder.iterdir()))
    return source.id, str(source.folder), source.config.to_json_string(use_diff=False), repr(source.quantization), tensors, files
