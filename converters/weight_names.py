"""From the names of a checkpoint to the parameters of a model, by transformers' own conversion rules.

transformers 5 renames and restructures checkpoints while loading (experts merged, gate and up joined…). The same rules
run here on names and shapes alone; what they do to bytes becomes a ``Derived`` weight that runs when it is read.
Source: transformers/core_model_loading.py, convert_and_load_state_dict_in_model @5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from calque.errors import Unsupported
from calque.stored_integers import Dequantized
from calque.weights import Derived, Stored, Weight, WeightTable, cast, torch_dtype_name

# Tensors that old checkpoints hold and no model needs: masks and rotary tables that are computed from the config.
WAIVED = (
    r"embeddings\.position_ids$",
    r"rotary_emb\.inv_freq$",
    r"\.masked_bias$",
    r"\.attn\.bias$",
    r"\.attention\.bias$",
    r"\.attention\.masked_bias$",
)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass
class _Conversion:
    """The checkpoint tensors that one rule turns into one group of parameters."""

    converter: WeightConverter
    parts: list[tuple[str, Weight]] = field(default_factory=list)

    def run(self, name: str, model: PreTrainedModel, tensors: list[torch.Tensor], keys: list[str]) -> dict[str, torch.Tensor]:
        """Return the parameters that the rule makes of ``tensors``, by full name."""
        converter = deepcopy(self.converter)
        for (pattern, _), key, tensor in zip(self.parts, keys, tensors, strict=True):
            # A callable stands for a tensor that is read when the rule runs, as when transformers loads without threads.
            read: Any = partial(_itself, tensor)
            converter.add_tensor(name, key, pattern, read)
        made = converter.convert(name, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def weight_table(model: PreTrainedModel, tensors: Mapping[str, Weight], origin: str, waived: Sequence[str] = ()) -> WeightTable:
    """Return the table of ``model``, whose parameters are fake, over the ``tensors`` of a checkpoint.

    Every entry has the dtype of its parameter in ``model``. Tied names share one entry. ``required`` is left empty: the
    graph, once traced, says which of the names it needs. ``waived``: patterns of tensors that no one need read.
    """
    state = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    entries, unused = _match(model, tensors, state, waived)
    _require_linear(model, entries, origin)
    table: dict[str, Weight] = {name: cast(weight, _name(state[name])) for name, weight in entries.items()}
    _tie(model, state, table)
    return WeightTable(table, unused=tuple(unused), available=tuple(tensors), origin=origin)


def _require_linear(model: PreTrainedModel, entries: Mapping[str, Weight], origin: str) -> None:
    """Leave quietly if what is quantized is not the weight of a product that lies [in, out]: formats hold [out, in].

    Raises:
        Unsupported: every such weight.
    """
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    if found := [name for name, weight in entries.items() if name in turned and isinstance(weight, Dequantized)]:
        raise Unsupported(
            f"{origin} has quantized weights that its model holds the other way round", found, "convert the model that was not quantized"
        )


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    persistent = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


def _match(
    model: PreTrainedModel, tensors: Mapping[str, Weight], state: Mapping[str, Any], waived: Sequence[str]
) -> tuple[dict[str, Weight], list[str]]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    patterns = [re.compile(pattern) for pattern in (*WAIVED, *waived, *(model._keys_to_ignore_on_load_unexpected or ()))]

    entries: dict[str, Weight] = {}
    unused: list[str] = []
    groups: dict[str, _Conversion] = {}
    keys: dict[str, list[str]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(state))
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, dict(state))
        if name not in state:
            if not any(regex.search(key) or regex.search(name) for regex in patterns):
                unused.append(key)
        elif pattern is None:
            entries[name] = tensors[key]
        else:
            groups.setdefault(name, _Conversion(by_pattern[pattern])).parts.append((pattern, tensors[key]))
            keys.setdefault(name, []).append(key)
    for name, group in groups.items():
        try:
            entries.update(_derived(name, group, keys[name], model))
        except (IndexError, RuntimeError, TypeError, ValueError):
            unused += keys[name]  # a part is missing or misshapen: the ledger lists what is left over
    return entries, unused


def _derived(name: str, group: _Conversion, keys: list[str], model: PreTrainedModel) -> dict[str, Weight]:
    """Return the weights a rule makes, their shapes found by running it on tensors without bytes."""
    sources = tuple(stored for _, stored in group.parts)
    shapes = [torch.empty(s.shape, dtype=getattr(torch, torch_dtype_name(s)), device="meta") for s in sources]
    made = group.run(name, model, shapes, keys)
    operation = "+".join(type(step).__name__ for step in group.converter.operations)

    def weight(target: str) -> Derived:
        def compute(*tensors: torch.Tensor) -> torch.Tensor:
            return group.run(name, model, list(tensors), keys)[target].contiguous()

        return Derived(sources, operation, compute, _name(made[target]), tuple(made[target].shape))

    return {target: weight(target) for target in made}


def _tie(model: PreTrainedModel, state: Mapping[str, torch.Tensor], table: dict[str, Weight]) -> None:
    """Leave tied parameters with one shared entry, or untied where the checkpoint holds two that differ, as upstream does."""
    names: dict[int, list[str]] = {}
    for name, parameter in state.items():
        names.setdefault(id(parameter), []).append(name)
    for group in (group for group in names.values() if len(group) > 1):
        present = [name for name in group if name in table]
        if not present:
            continue
        first = table[present[0]]
        for name in group:
            if name in table and name != present[0] and not _equal(first, table[name]):
                _untie(model, name)
            else:
                table[name] = first


def _equal(one: Weight, other: Weight) -> bool:
    if isinstance(one, Stored) and one == other:
        return True  # a pickle holds both names, over the same bytes
    return one.shape == other.shape and torch_dtype_name(one) == torch_dtype_name(other) and torch.equal(one.read(), other.read())


def _untie(model: PreTrainedModel, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    model.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(torch.empty_like(parameter), requires_grad=False))
