"""The only monkey patches: where upstream's code cannot be traced, or is wrong for a batch. Each has an expiry test."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from calque.artifact import Limits
from calque.converters import own_experts, positions


@dataclass(frozen=True)
class Patch:
    """A replacement for a method of the modules that ``where`` picks, and what it does to the model's limits.

    ``replacement`` None: nothing can be replaced, and the limits say what the model is not right for. ``expires``: what
    upstream would have to do for the patch to go; a test fails once that is so.
    """

    name: str
    where: Callable[[nn.Module], bool]
    replacement: Callable[..., Any] | None
    limits: Callable[[nn.Module, Limits], Limits]
    reason: str
    link: str
    versions: str
    expires: str
    method: str = "forward"


def rope_types(module: Any) -> set[str]:
    """Return the rotary types of a rotary module (one, or one per kind of layer); empty for any other module."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return {kind for kind in kinds.values() if isinstance(kind, str)}
    return {kinds} if isinstance(kinds, str) else set()


def _rope_parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = module.config.rope_parameters
    chosen: dict[str, Any] = parameters if layer_type is None else parameters[layer_type]
    return chosen


def _cos_sin(made: Any) -> tuple[Tensor, Tensor]:
    cos, sin = made
    return cos, sin


def longrope_forward(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [B, S, D], with each row's own choice of short or long frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer_type is None else f"{layer_type}_"
    options = {} if layer_type is None else {"layer_type": layer_type}
    plain = inspect.unwrap(type(module).forward)
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    threshold = int(_rope_parameters(module, layer_type)["original_max_position_embeddings"])
    if kind != "longrope":
        return _cos_sin(plain(module, x, position_ids, **options))
    short = getattr(module, f"{prefix}original_inv_freq")
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, x.device, seq_len=threshold + 1, **options)

    def rotate(frequencies: Tensor) -> tuple[Tensor, Tensor]:
        setattr(module, f"{prefix}inv_freq", frequencies)
        return _cos_sin(plain(module, x, position_ids, **options))

    (cos_long, sin_long), (cos_short, sin_short) = rotate(long), rotate(short)
    is_long = (position_ids.amax(-1, keepdim=True) + 1 > threshold).unsqueeze(-1)
    return torch.where(is_long, cos_long, cos_short), torch.where(is_long, sin_long, sin_short)


def constant_frequencies_forward(
    module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [B, S, D], with the frequencies the model was trained with."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    return _cos_sin(inspect.unwrap(type(module).forward)(module, x, position_ids, **options))


def _recompute_limit(module: Any, limits: Limits) -> Limits:
    parameters = module.config.rope_parameters
    groups = parameters.values() if isinstance(next(iter(parameters.values())), dict) else [parameters]
    thresholds = [int(group["original_max_position_embeddings"]) for group in groups if group.get("rope_type") == "longrope"]
    return replace(limits, recompute_at=min(thresholds))


def _length_limit(module: Any, limits: Limits) -> Limits:
    longest = int(module.original_max_seq_len)
    return replace(limits, max_length=min(longest, limits.max_length or longest))


def gaussian_top_forward(module: Any, inputs: Tensor) -> Tensor:
    """Return what of the inputs, [B, S, F], lies above the quantile of a normal distribution with their mean and deviation."""
    quantile = NormalDist().inv_cdf(float(module.activation_sparsity))
    mean, deviation = inputs.mean(-1, keepdim=True), inputs.std(-1, keepdim=True, unbiased=False)
    return torch.relu(inputs - (mean + deviation * quantile))


def _unlimited(module: nn.Module, limits: Limits) -> Limits:
    return limits


def _alibi_limit(module: Any, limits: Limits) -> Limits:
    longest = int(module.max_seq_length)
    return replace(limits, max_length=min(longest, limits.max_length or longest))


def _slot_limits(module: Any, limits: Limits) -> Limits:
    rows = int(module.num_embeddings)
    return replace(limits, padding="none", max_length=min(rows, limits.max_length or rows))


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="longrope_per_row",
        where=lambda module: "longrope" in rope_types(module),
        replacement=longrope_forward,
        limits=_recompute_limit,
        reason="upstream chooses short or long frequencies by the longest row of the batch, so a short row changes when a "
        "long one stands beside it; each row has to be what it is alone",
        link="transformers/modeling_rope_utils.py, dynamic_rope_update.longrope_frequency_update",
        versions="transformers 5.x",
        expires="a short row's cos beside a long row equals its cos alone",
    ),
    Patch(
        name="dynamic_ntk_constant",
        where=lambda module: any("dynamic" in kind for kind in rope_types(module)),
        replacement=constant_frequencies_forward,
        limits=_length_limit,
        reason="upstream recomputes every frequency at each length past the trained one, in Python; keys in a cache keep their "
        "old rotation, so past that length no cache is right. The artifact is limited to the trained length",
        link="transformers/modeling_rope_utils.py, dynamic_rope_update.dynamic_frequency_update",
        versions="transformers 5.x",
        expires="the forward of a dynamic-NTK rotary module can be exported without a data-dependent guard",
    ),
    Patch(
        name="position_table_by_position",
        where=positions.counts_slots,
        replacement=positions.table_forward,
        limits=_unlimited,
        reason="decoders of the BART family read their position table at cache slots, padding counted, and take no positions: "
        "a padded row would differ from the row alone",
        link="transformers/models/bart/modeling_bart.py, BartLearnedPositionalEmbedding and BartDecoder.forward",
        versions="transformers 5.x",
        expires="the forward of BartForCausalLM takes position_ids",
    ),
    Patch(
        name="position_table_of_fixed_length",
        where=positions.grows,
        replacement=positions.fixed_table_forward,
        limits=_unlimited,
        reason="XGLM makes its table of sines longer while it runs, which bounds both lengths at export and reads it by Python",
        link="transformers/models/xglm/modeling_xglm.py, XGLMSinusoidalPositionalEmbedding.forward",
        versions="transformers 5.x",
        expires="XGLMSinusoidalPositionalEmbedding has no make_weights",
    ),
    Patch(
        name="positions_after_padding_index",
        where=positions.starts_after_padding_index,
        replacement=positions.offset_forward,
        limits=_unlimited,
        reason="embeddings of the RoBERTa family count positions from padding_idx + 1 where none are given, and from 0 where they are: "
        "the graph's positions count from 0 for every model",
        link="transformers/models/roberta/modeling_roberta.py, RobertaEmbeddings.forward",
        versions="transformers 5.x",
        expires="RobertaEmbeddings gives the same for position_ids 0, 1, 2… and for none",
    ),
    Patch(
        name="temperature_by_position",
        where=positions.tunes_temperature,
        replacement=positions.temperature_forward,
        limits=_unlimited,
        reason="Llama 4 scales the queries of its layers without rotary embedding by cache slot, padding counted",
        link="transformers/models/llama4/modeling_llama4.py, Llama4TextAttention.forward",
        versions="transformers 5.x",
        expires="a left-padded row's queries equal those of the row alone",
    ),
    Patch(
        name="alibi_by_position",
        where=lambda module: type(module).__name__ == "MptAttention",
        replacement=positions.alibi_forward,
        limits=_alibi_limit,
        reason="MPT measures ALiBi's distance in cache slots: the gap that right padding leaves in the cache counts as distance",
        link="transformers/models/mpt/modeling_mpt.py, MptAttention.forward and build_mpt_alibi_tensor",
        versions="transformers 5.x",
        expires="MptModel builds its ALiBi bias from the attention mask, as Bloom does",
    ),
    Patch(
        name="local_attention_by_position",
        where=lambda module: type(module).__name__ == "GPTNeoSelfAttention",
        replacement=positions.local_attention,
        limits=_unlimited,
        reason="GPT-Neo cuts its mask out of a table by length, which bounds lengths at export, and measures its window in slots",
        link="transformers/models/gpt_neo/modeling_gpt_neo.py, GPTNeoSelfAttention._attn",
        versions="transformers 5.x",
        expires="GPTNeoSelfAttention has no mask buffer",
        method="_attn",
    ),
    Patch(
        name="gaussian_quantile_constant",
        where=lambda module: hasattr(module, "_gaussian_topk") and hasattr(module, "activation_sparsity"),
        replacement=gaussian_top_forward,
        limits=_unlimited,
        reason="Gemma 3n computes the quantile of its activation sparsity, a constant, with an operator that no runtime has (erf_inv)",
        link="transformers/models/gemma3n/modeling_gemma3n.py, Gemma3nTextMLP._gaussian_topk",
        versions="transformers 5.x",
        expires="the graph of Gemma3nTextMLP has no erfinv",
        method="_gaussian_topk",
    ),
    Patch(
        name="aria_batch_kept_whole",
        where=lambda module: type(module).__name__ == "AriaTextMoELayer",
        replacement=own_experts.aria_forward,
        limits=_unlimited,
        reason="Aria flattens a batch and views the list as a batch again, of which export can no longer tell that it lies in order",
        link="transformers/models/aria/modeling_aria.py, AriaTextMoELayer.forward",
        versions="transformers 5.x",
        expires="AriaTextMoELayer gives its shared experts the batch as it came",
    ),
    Patch(
        name="dbrx_every_expert",
        where=lambda module: type(module).__name__ == "DbrxExperts",
        replacement=own_experts.dbrx_forward,
        limits=_unlimited,
        reason="DBRX loops over the experts that were hit and offers no other implementation",
        link="transformers/models/dbrx/modeling_dbrx.py, DbrxExperts.forward",
        versions="transformers 5.x",
        expires="DbrxForCausalLM can set its experts implementation",
    ),
    Patch(
        name="jetmoe_routing_unsorted",
        where=lambda module: type(module).__name__ == "JetMoeTopKGating",
        replacement=own_experts.jetmoe_router_forward,
        limits=_unlimited,
        reason="JetMoE sorts tokens into groups whose sizes it reads back as Python numbers",
        link="transformers/models/jetmoe/modeling_jetmoe.py, JetMoeTopKGating.forward",
        versions="transformers 5.x",
        expires="JetMoeTopKGating reads no sizes with tolist",
    ),
    Patch(
        name="jetmoe_every_expert",
        where=lambda module: type(module).__name__ == "JetMoeParallelExperts",
        replacement=own_experts.jetmoe_experts_forward,
        limits=_unlimited,
        reason="JetMoE's experts, of attention too, split their input by group sizes; given each row's expert they need none",
        link="transformers/models/jetmoe/modeling_jetmoe.py, JetMoeParallelExperts.forward",
        versions="transformers 5.x",
        expires="JetMoeParallelExperts splits by no sizes",
    ),
    Patch(
        name="longcat_every_expert",
        where=lambda module: type(module).__name__ == "LongcatFlashExperts",
        replacement=own_experts.longcat_forward,
        limits=_unlimited,
        reason="LongCat-Flash loops over the experts that were hit and offers no other implementation",
        link="transformers/models/longcat_flash/modeling_longcat_flash.py, LongcatFlashExperts.forward",
        versions="transformers 5.x",
        expires="LongcatFlashForCausalLM can set its experts implementation",
    ),
    Patch(
        name="sines_by_slot",
        where=lambda module: type(module).__name__ == "RoFormerSinusoidalPositionalEmbedding",
        replacement=None,
        limits=_slot_limits,
        reason="RoFormer turns every row of a batch by the same cache slots: the gap that right padding leaves counts as distance",
        link="transformers/models/roformer/modeling_roformer.py, RoFormerEncoder.forward",
        versions="transformers 5.x",
        expires="the forward of RoFormerForCausalLM takes position_ids",
    ),
    Patch(
        name="mask_widened_for_images",
        where=lambda module: type(module).__name__ == "GitModel",
        replacement=None,
        limits=lambda module, limits: replace(limits, padding="none"),
        reason="GIT takes every cached call to follow an image and puts that image's columns before the mask: padding ends up elsewhere",
        link="transformers/models/git/modeling_git.py, GitModel.forward",
        versions="transformers 5.x",
        expires="a padded row's cached step in GitForCausalLM without an image equals that of the row alone",
    ),
)


def apply(model: nn.Module) -> tuple[Limits, tuple[str, ...]]:
    """Return the limits that the patched modules impose and the names of the patches that were needed."""
    limits, used = Limits(), []
    for patch in PATCHES:
        for module in filter(patch.where, model.modules()):
            if patch.replacement is not None:
                setattr(module, patch.method, functools.partial(patch.replacement, module))
            limits = patch.limits(module, limits)
            used.append(patch.name)
    return limits, tuple(dict.fromkeys(used))
