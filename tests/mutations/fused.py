"""The gate over a model whose operators were joined, in each padding profile, and faults of the joined operators themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from calque import passes
from calque.targets.onnxruntime import OnnxRuntime
from calque.traced import TracedModel, refresh, user_nodes
from calque.validation import scenarios
from calque.validation.compare import Row
from tests.mutations.traced_gate import TracedGate
from tests.tiny_models import VOCABULARY

grouped = torch.ops.calque.grouped_attention.default

# Where arguments of calque.grouped_attention stand.
BIAS, KEY_MASK, COS, SIN, SINKS, SCALE, SOFTCAP, WINDOW, INTERLEAVED = 5, 6, 7, 8, 9, 12, 13, 14, 15

# What padding right says by itself, from the lengths of rows and the window of a layer: the mask that these faults are in is gone.
OF_THE_MASK = {
    "mask transposed", "causality one too wide", "causality dropped", "own slot hidden", "padding ignored", "padding taken as right",
    "mask without past", "window off by one", "window ignored", "window invented",
}  # fmt: skip

# What padding any reads of every mask, and what of none: later slots are hidden by the operator, windows only read where a layer has one.
ALWAYS_READ = {"padding ignored", "padding taken as right"}
NEVER_READ = {"causality one too wide", "causality dropped", "window invented"}


def fused(model: TracedModel, padding: Any) -> TracedModel:
    """The model itself, every operator joined that the target joins."""
    for node in model.graph.nodes:  # a mutation writes nodes as a pass may not: without what they give
        if node.op == "call_function" and "val" not in node.meta:
            refresh(node)
    passes.run(OnnxRuntime(padding=padding).passes("fp32"), model)
    return model


def healed(mutation: str, model: TracedModel, padding: str) -> bool:
    """Whether joining took out of the model what the mutation had broken."""
    biases = [node.args[BIAS] for node in user_nodes(model.graph.nodes, grouped)]
    if padding != "any" or not biases:  # without a joined attention nothing reads a mask by its meaning
        return bool(biases) and mutation in OF_THE_MASK
    padding_alone = all(isinstance(bias, Node) and bias.target is torch.ops.calque.padding_bias.default for bias in biases)
    return mutation in NEVER_READ or (padding_alone and mutation in OF_THE_MASK - ALWAYS_READ)


def first_failure(gate: TracedGate, model: TracedModel) -> Row | None:
    """The row of the first scenario that fails, of those that the model's own limits allow or must refuse."""
    windows = {state.window for state in gate.traced.states if state.window}
    built = scenarios.build(model.limits, VOCABULARY, excluded=(0, 1, 2), windows=windows)
    # A table of angles ends where no reference was asked for.
    known = [scenario for scenario in built if scenario.name in gate.references]
    return replace(gate, scenarios=known).first_failure(gate.session(model))


def argument(place: int, change: Callable[[Any], Any], model: TracedModel) -> bool:
    """Change one argument of every joined attention that has it; whether any had."""
    changed = False
    for node in user_nodes(model.graph.nodes, grouped):
        old = node.args[place]
        if old is None or old in (0, 0.0):
            continue
        arguments = list(node.args)
        with model.graph.inserting_before(node):
            arguments[place] = change(old)
        node.args = tuple(arguments)
        changed = changed or arguments[place] is not old
    return changed


def _call(target: Any, value: Node, *args: Any) -> Node:
    return value.graph.call_function(target, (value, *args))


def _none(_: Any) -> None:
    return None


aten = torch.ops.aten
# Each breaks a joined model and says whether there was something to break.
FAULTS: dict[str, Callable[[TracedModel], bool]] = {
    "bias left out": partial(argument, BIAS, lambda bias: _call(aten.zeros_like.default, bias)),
    "bias of the row before": partial(argument, BIAS, lambda bias: _call(aten.roll.default, bias, [1], [0])),
    "every slot held": partial(argument, KEY_MASK, lambda mask: _call(aten.ones_like.default, mask)),
    "cosines one slot late": partial(argument, COS, lambda table: _call(aten.roll.default, table, [1], [0])),
    "sines one slot late": partial(argument, SIN, lambda table: _call(aten.roll.default, table, [1], [0])),
    "sines turned around": partial(argument, SIN, lambda table: _call(aten.neg.default, table)),
    "sinks left out": partial(argument, SINKS, _none),
    "scale of another head size": partial(argument, SCALE, lambda scale: scale * 1.1),
    "soft cap doubled": partial(argument, SOFTCAP, lambda cap: cap * 2),
    "window one wider": partial(argument, WINDOW, lambda window: window + 1),
    "window one narrower": partial(argument, WINDOW, lambda window: window - 1),
    "window left out": partial(argument, WINDOW, lambda _: 0),
}
