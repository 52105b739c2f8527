"""Converters: a Hugging Face model in, a traced model out. One file per task signature, found by the tasks it names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from calque.errors import Unsupported

if TYPE_CHECKING:
    from calque.source import ModelSource
    from calque.traced import TracedModel

_FILES = {"text-generation": "causal_lm", "text-generation-with-past": "causal_lm"}

DEFAULT_TASK = "text-generation-with-past"


def load(task: str) -> Callable[[ModelSource], TracedModel]:
    """Return the function that traces models of a task (optimum's task names).

    Raises:
        Unsupported: no converter for the task yet.
    """
    if task not in _FILES:
        raise Unsupported(f"there is no converter for the task {task!r}", fix=f"tasks today: {', '.join(sorted(_FILES))}")
    trace: Callable[[ModelSource], TracedModel] = import_module(f"calque.converters.{_FILES[task]}").trace
    return trace


def infer_task(source: ModelSource) -> str:
    """Return the task of a model that its recipe leaves out."""
    return DEFAULT_TASK
