"""The programs of the packages: one for every call, or beside it one for calls of one new token of each row.

::

    program    input_ids [batch, sequence], attention_mask [batch, past + sequence], …
    stepped    input_ids [batch, 1], attention_mask [batch, past + 1], …           traced anew, over the same weights
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.export import Dim

from calque.artifact import TensorSpec
from calque.errors import Unsupported
from calque.targets._aotinductor_compile import examples, stood_in, user_inputs

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SEQUENCE, PAST, TOTAL = "sequence_length", "past_sequence_length", "total_sequence_length"


def stepped(program: ExportedProgram, specs: Sequence[TensorSpec]) -> ExportedProgram:
    """Return the program for one new token of each row; weights keep their names."""
    stood_in(program)
    given, shapes = [], []
    for spec, example in zip(specs, examples(program), strict=True):
        sizes = [_size(name, size) for name, size in zip(spec.shape, example.shape, strict=True)]
        given.append(torch.zeros(sizes, dtype=example.dtype, device=example.device))
        shapes.append({at: Dim.AUTO for at, name in enumerate(spec.shape) if isinstance(name, str) and name != SEQUENCE})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about torch
        made: ExportedProgram = torch.export.export(program.module(check_guards=False), tuple(given), dynamic_shapes=tuple(shapes))
    return made


def _size(name: int | str, size: int) -> int:
    """Return the size that a dimension is traced at: no two dimensions alike, and none 1, which would be taken for all there is."""
    return {SEQUENCE: 1, "batch_size": 3, PAST: 6, TOTAL: 7}.get(name, size) if isinstance(name, str) else size


def step_specs(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return inputs or outputs as they are for one new token of each row."""
    return tuple(replace(spec, shape=tuple(1 if size == SEQUENCE else size for size in spec.shape)) for spec in specs)


def require_dynamic(program: ExportedProgram, specs: Sequence[TensorSpec], name: str) -> None:
    """Leave quietly if every dimension that has a name is one in the program, and every other a number.

    Raises:
        Unsupported: each input whose shape was baked in.
    """
    wrong = []
    for spec, node in zip(specs, user_inputs(program), strict=True):
        found = node.meta["val"].shape
        if any(isinstance(size, str) != isinstance(held, torch.SymInt) for size, held in zip(spec.shape, found, strict=True)):
            wrong.append(f"{spec.name}  {list(spec.shape)} became {[str(size) for size in found]}")
    if wrong:
        raise Unsupported(f"{name} would take no shapes but those it was traced at", wrong, "report it: the trace has lost a dimension")
