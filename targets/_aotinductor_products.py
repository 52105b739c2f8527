"""Products with integers inside a package: C++ of our own beside what Inductor writes, and the switch that says whether values are rounded.

::

    before  calque.panel_linear(%x, …, None, bits, block, out)
    after   calque.panel_linear(contiguous(%x), …, %rounds, bits, block, out)     %rounds = calque.rounds, int8 [1], a weight of the file

Inductor's own ways to multiply integers on a CPU are not taken: oneDNN's are fast with weights that it has laid out for one processor
and that belong to the package then, ATen's `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` in bfloat16 alone.
That the switch is a weight lets one package run with and without rounding, which is how it is proved.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calque.patterns import aten
from calque.runtime.aotinductor_session import ROUNDS
from calque.traced import call, user_nodes
from calque.weights import Derived

if TYPE_CHECKING:
    from calque.traced import TracedModel

PANEL_LINEAR = torch.ops.calque.panel_linear.default
SOURCE = Path(__file__).with_name("_aotinductor_panels.cpp")
INCLUDED = re.compile(r'#include "(\S+)"')


def switched(model: TracedModel, rounds: bool) -> TracedModel:
    """Return a copy whose products with integers are told by a weight whether to round what they read."""
    made = model.copy()
    products = user_nodes(made.graph.nodes, PANEL_LINEAR)
    if not products:
        return made
    read = partial(torch.tensor, [int(rounds)], dtype=torch.int8)
    first: Any = products[0].args[1]
    switch = made.add_parameter(ROUNDS, Derived((), "switch", read, "int8", (1,), moved=False), like=first)
    for product in products:
        given: list[Any] = list(product.args)
        with made.graph.inserting_before(product):
            given[0] = call(made.graph, aten.contiguous.default, given[0])
        given[5] = switch
        product.args = tuple(given)
    made.finish_rewrite()
    return made


def shims() -> dict[Any, list[str]]:
    """Return the C++ of our operators as Inductor takes it: declarations that it writes into a block of ``extern "C"``.

    The block is closed before the source and opened again behind it; Inductor writes ``extern`` before and a semicolon after.
    """
    source = INCLUDED.sub(lambda name: SOURCE.with_name(name[1]).read_text(encoding="utf-8"), SOURCE.read_text(encoding="utf-8"))
    return {PANEL_LINEAR: [f'int calque_before;\n}}\n{source}\nextern "C" {{\nextern int calque_behind']}
