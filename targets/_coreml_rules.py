"""Which operators of a graph MIL can say: those of the tables, and what is written in them by torch's decompositions or our references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from calque.targets._aten import NAMESPACE, to_aten
from calque.targets._coreml_package import quiet
from calque.traced import TracedModel

if TYPE_CHECKING:
    from calque.targets._coreml_function import Rule


@cache
def rules() -> Mapping[Any, Rule]:
    """Return what each operator becomes."""
    with quiet():
        from calque.targets._coreml_operators import OPERATORS
        from calque.targets._coreml_semantic import SEMANTIC
        from calque.targets._coreml_shapes import SHAPES
    return {**OPERATORS, **SHAPES, **SEMANTIC}


@cache
def _decompositions() -> Mapping[Any, Any]:
    """Return torch's decompositions of ATen, by operator."""
    found: Mapping[Any, Any] = dict(torch.export.default_decompositions())
    return found


def translatable(model: TracedModel) -> TracedModel:
    """Return the model with what has no rule written in what has; itself where everything has one."""
    missing = {node.target for node in _without_rule(model)}
    if not missing:
        return model
    known = {target: _decompositions()[target] for target in missing if target in _decompositions()}
    kept = [target for target in rules() if getattr(target, "namespace", "") == NAMESPACE]
    return replace(model, program=to_aten(model, known, kept))


def untranslated(model: TracedModel) -> list[Node]:
    """Return the nodes that MIL cannot say, written out or not."""
    missing = _without_rule(model)
    wanting = [node for node in missing if node.target not in _decompositions() and getattr(node.target, "namespace", "") != NAMESPACE]
    return _without_rule(translatable(model)) if missing and not wanting else wanting


def _without_rule(model: TracedModel) -> list[Node]:
    return [node for node in model.graph.nodes if node.op == "call_function" and _is_value(node) and node.target not in rules()]


def _is_value(node: Node) -> bool:
    """Return whether a node gives values: lengths are reckoned where they are read, assertions say nothing of the result."""
    return not isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | int | None)
