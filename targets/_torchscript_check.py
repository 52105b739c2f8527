"""What a module in TorchScript cannot be run for, found before any weight is read: the lines are compiled over stand-ins.

Each call is held against the runtime of phones as bytecode calls it there: by name and overload, with the arguments up to the last
that is not its default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from calque.runtime.torchscript_session import quiet
from calque.targets import Problem
from calque.targets import _torchscript as torchscript
from calque.targets._mobile_operators import operators, runtime_version
from calque.targets._torchscript import Writer
from calque.targets._torchscript_integers import packed_weight, packing
from calque.traced import source_of

LINE = re.compile(r'File "<string>", line (\d+)')
# What is an instruction of bytecode, and no operator.
INSTRUCTIONS = frozenset(
    {
        "prim::Constant", "prim::ListConstruct", "prim::ListUnpack", "prim::TupleConstruct", "prim::TupleUnpack", "prim::TupleIndex",
        "prim::GetAttr", "prim::If", "prim::Loop", "prim::unchecked_cast", "prim::Uninitialized",
    }
)  # fmt: skip


def problems(written: Writer, mobile: bool = False) -> list[Problem]:
    """Return the nodes that have no line, those whose line TorchScript refuses, and on ``mobile`` those that phones cannot run."""
    if written.problems:
        return written.problems
    try:
        module = _compiled(written)
    except RuntimeError as error:
        return [_refused(written, str(error))]
    return list(_absent(written, module.graph)) if mobile else []


def _compiled(written: Writer) -> torch.jit.ScriptModule:
    """Return the module over values of the right types and no size."""
    with quiet(), packing():
        nothing = torch.zeros(8, 8, dtype=torch.int8), torch.ones(8)
        values = {
            name: packed_weight(*nothing) if each.make is packed_weight else torch.empty(0) for name, each in written.attributes.items()
        }
        return torchscript.compiled(written, values)


def _refused(written: Writer, said: str) -> Problem:
    """Return the problem of a line that TorchScript does not compile."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    place = LINE.search(said)
    node = written.origins[int(place[1]) - 2] if place and int(place[1]) >= 2 else written.origins[-1]
    return Problem(node.name, *source_of(node), f"TorchScript refuses {node.target}: {lines[0]}", "use a model without it")


def _absent(written: Writer, graph: Any) -> Iterator[Problem]:
    """Yield each call of an operator that the runtime of phones has not, or has with other arguments."""
    for call in _calls(graph):
        if call.kind() in INSTRUCTIONS:
            continue
        name, known, needed = _called(call)
        had = operators().get(name)
        if had is not None and had[:needed] == known[:needed] and needed <= len(had):
            continue
        node = _origin(written, call)
        why = f"PyTorch Mobile {runtime_version()} has no operator {name}"
        if had is not None:
            why = f"PyTorch Mobile {runtime_version()} has {name} with arguments ({', '.join(had)}), and not ({', '.join(known[:needed])})"
        yield Problem(node.name, *source_of(node), why, "use a model without it, or another target")


def _calls(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _calls(inner)


def _called(call: Any) -> tuple[str, list[str], int]:
    """Return the name and overload of a call, the types of its arguments, and how many of them bytecode gives."""
    text: str = call.schema()
    if "(" not in text or text.startswith("("):
        return call.kind(), [], 0
    schema = torch._C.parse_schema(text)
    inputs = list(call.inputs())
    needed = 0
    for at, (argument, value) in enumerate(zip(schema.arguments, inputs, strict=False)):
        constant = value.node().kind() == "prim::Constant"
        if not (argument.has_default_value() and constant and value.toIValue() == argument.default_value):
            needed = at + 1
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    return name, [str(argument.type) for argument in schema.arguments], needed


def _origin(written: Writer, call: Any) -> Node:
    place = LINE.search(call.sourceRange())
    return written.origins[max(int(place[1]) - 2, 0) if place else -1]
