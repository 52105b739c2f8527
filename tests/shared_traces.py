"""One trace for all conversions of a checkpoint in a process, for tests of what comes after tracing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from calque import converters

if TYPE_CHECKING:
    from calque.source import ModelSource
    from calque.tasks import Task
    from calque.traced import TracedModel

_TRACES: dict[Hashable, TracedModel] = {}
own = converters.load


def load(task: Task) -> Callable[[ModelSource], TracedModel]:
    """Return what `converters.load` returns, but that it traces once a process and gives a copy to whom asks again."""
    trace = own(task)

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
