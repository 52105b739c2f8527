"""A program in ATen alone: what runtimes read that know no operators of ours.

::

    before  %all = calque.cache_update(%past, %new)    %out = calque.attention(%q, %k, %v, %mask, …)    every calque operator
    after   %all = aten.cat([%past, %new], 2)          %out = aten.scaled_dot_product_attention(%q, …)   what it means

Operators of ATen stay as they are, linear layers and attention among them: runtimes and compilers know these whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.export.graph_signature import InputKind

from calque.artifact import NUM_LOGITS_TO_KEEP
from calque.ops import decompose_attention
from calque.targets import Problem

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from calque.traced import TracedModel

NAMESPACE = "calque"

Meaning = Callable[..., Any]


def to_aten(model: TracedModel, meanings: Mapping[Any, Meaning] | None = None, whole: Collection[Any] = ()) -> ExportedProgram:
    """Return the program in ATen, but for the operators ``whole``; its parameters are still fake.

    Its arguments and results are positional, in the order of ``model.inputs`` and ``outputs``. ``meanings``: what operators are
    written as that a runtime knows better than by their reference, of ours or ATen's.
    """
    bare = model.copy()
    bare.keep_outputs(range(len(bare.outputs)))  # all of them, and arguments by position from here on
    ours = [each for each in OPDEFS.values() if each._namespace == NAMESPACE and each._opoverload not in whole]
    table = {**{each._opoverload: each._init_fn for each in ours}, **(meanings or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies a class that it has deprecated
        written: ExportedProgram = bare.program.run_decompositions(table)
    return written


def bind(program: ExportedProgram, model: TracedModel) -> ExportedProgram:
    """Return the program with every real tensor in the place of its fake; every weight is read."""
    real = tensors(model)
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        if spec.target in program.constants:
            program.constants[spec.target] = real[spec.target]
        else:
            parameter = spec.kind == InputKind.PARAMETER
            held = real[spec.target]
            program.state_dict[spec.target] = torch.nn.Parameter(held, requires_grad=False) if parameter else held
    return program


def tensors(model: TracedModel) -> dict[str, Tensor]:
    """Return the real tensor of every parameter, buffer and constant by its name; every weight is read.

    By name: decomposing a program puts its parameters in another order.
    """
    specs = model.program.graph_signature.input_specs
    names = [spec.target for spec in specs if spec.kind != InputKind.USER_INPUT and spec.target is not None]
    return dict(zip(names, model.bind(), strict=True))


def lengths_of_values(model: TracedModel) -> list[Problem]:
    """Return what no program of ATen alone is asked: how many logits a call gives must not depend on the values that it is given."""
    if all(spec.name != NUM_LOGITS_TO_KEEP for spec in model.inputs):
        return []
    why = "a length that a call's values decide is none that the target can have"
    return [Problem(NUM_LOGITS_TO_KEEP, "", "", why, "leave --logits dynamic out; --logits last gives those of the last position alone")]


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None, causal: bool
) -> Tensor:
    """Return what ``calque::attention`` does, as ATen's own attention where that can say it."""
    if softcap > 0 or sinks is not None:
        return decompose_attention(q, k, v, mask, scale, softcap, sinks, causal)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = _repeated(k, groups), _repeated(v, groups)
    if mask is None and causal:
        # Lower right: ATen's own `is_causal` is upper left.
        ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = ones.tril(k.shape[2] - q.shape[2])[None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _repeated(heads: Tensor, groups: int) -> Tensor:
    """Return each of the heads [B, H, K, D] so many times in a row, without indices that are computed: [B, H · groups, K, D]."""
    apart = heads.unsqueeze(2).expand(-1, -1, groups, -1, -1)
    return apart.reshape(heads.shape[0], heads.shape[1] * groups, heads.shape[2], heads.shape[3])
