"""A module in TorchScript made of its lines and its weights, and written as a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calque.runtime.torchscript_session import quiet
from calque.targets import _torchscript
from calque.targets._torchscript import Writer
from calque.targets._torchscript_integers import packing

if TYPE_CHECKING:
    import torch

    from calque.traced import TracedModel


def module(written: Writer, model: TracedModel) -> torch.jit.ScriptModule:
    """Return the frozen module; every weight is read."""
    nodes = [node for node in written.program.graph.nodes if node.op == "placeholder" and node.name in written.held]
    with quiet(), packing():
        return _torchscript.frozen(written, dict(zip(nodes, model.bind(), strict=True)))


def save(written: Writer, model: TracedModel, path: Path) -> None:
    """Write the module that torch loads."""
    made = module(written, model)
    with quiet(), packing():
        made.save(str(path))


def save_lite(written: Writer, model: TracedModel, path: Path) -> None:
    """Write the module that the lite interpreter loads."""
    made = module(written, model)
    with quiet(), packing():
        made._save_for_lite_interpreter(str(path))
