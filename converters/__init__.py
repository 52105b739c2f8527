"""Converters: a Hugging Face model in, a traced model out. One file per task signature, found by the tasks it names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from calque.errors import Unsupported, UsageError
from calque.suggest import nearest

if TYPE_CHECKING:
    from calque.source import ModelSource
    from calque.traced import TracedModel

_FILES = {"text-generation": "causal_lm", "text-generation-with-past": "causal_lm"}

DEFAULT_TASK = "text-generation-with-past"


def load(task: str) -> Callable[[ModelSource], TracedModel]:
    """Return the function that traces models of a task: optimum's name for it, or one of its synonyms.

    Raises:
        UsageError: optimum knows no such task.
        Unsupported: there is no converter for the task yet.
    """
    name = task if task in _FILES else _optimum_name(task)
    if name not in _FILES:
        raise Unsupported(f"there is no converter for the task {task!r} yet", fix=f"tasks today: {', '.join(sorted(_FILES))}")
    trace: Callable[[ModelSource], TracedModel] = import_module(f"calque.converters.{_FILES[name]}").trace
    return trace


def _optimum_name(task: str) -> str:
    from optimum.exporters.tasks import TasksManager

    known: list[str] = TasksManager.get_all_tasks()
    name: str = TasksManager.map_from_synonym(task.removesuffix("-with-past"))
    if name not in known:
        raise UsageError(f"there is no task {task!r}{nearest(task, known)}", fix=f"tasks today: {', '.join(sorted(_FILES))}")
    return name


def infer_task(source: ModelSource) -> str:
    """Return the task of a model that its recipe leaves out."""
    return DEFAULT_TASK
