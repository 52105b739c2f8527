"""Converters: a Hugging Face model in, a traced model out. One file per task signature, named by the tasks that it serves."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calque.source import ModelSource
    from calque.tasks import Task
    from calque.traced import TracedModel


def load(task: Task) -> Callable[[ModelSource], TracedModel]:
    """Return the function that traces models of the task."""
    trace: Callable[[ModelSource], TracedModel] = import_module(f"calque.converters.{task.converter}").trace
    return trace
