"""The one check that every pass's test begins with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calque import passes
from calque.passes import Pass, Rewrites
from calque.traced import TracedModel
from tests.tiny_models import answers

Inputs = dict[str, NDArray[Any]]
# Two orders of the same sums: what float32 rounding may change, in σ of an output.
ROUNDING = 1e-5


def histogram(model: TracedModel) -> Counter[str]:
    """How often the graph calls each operator."""
    return Counter(str(node.target) for node in model.graph.nodes if node.op == "call_function")


def check_pass(pass_: Pass, model: TracedModel, inputs: Inputs, rounding: float = ROUNDING) -> Rewrites:
    """The pass changes something, keeps every number, leaves a sound graph, and changes nothing the second time.

    Numbers are those of ``inputs`` before and after; every output that both graphs have must agree. An output that a
    pass cut to its last positions is compared with the last of what it was. ``rounding``: what may differ, in σ of an output.
    """
    before = answers(model, inputs)
    code, names = str(model.graph), {spec.name for spec in model.inputs}
    done = passes.run_one(pass_, model)
    assert done.count > 0
    assert str(model.graph) != code
    assert names <= {spec.name for spec in model.inputs}
    after = answers(model, inputs)
    assert before.keys() <= after.keys()
    for name, expected in before.items():
        wanted = expected[:, -after[name].shape[1] :] if name == "logits" else expected
        assert wanted.shape == after[name].shape, name
        assert np.abs(wanted - after[name].astype(np.float32)).max() <= rounding * wanted.std(), name
    model.graph.lint()
    model.program.validate()  # type: ignore[no-untyped-call]
    _check_second_run(pass_, model)
    assert all(name and reason for name, reason in done.skipped)
    return done


def _check_second_run(pass_: Pass, model: TracedModel) -> None:
    code, inputs, outputs, entries = str(model.graph), model.inputs, model.outputs, dict(model.weights.entries)
    assert passes.run_one(pass_, model).count == 0
    assert str(model.graph) == code
    assert (model.inputs, model.outputs, model.weights.entries) == (inputs, outputs, entries)
