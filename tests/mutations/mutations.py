"""The table of mutations: what is broken, where it does not apply and why, and which part of the gate it takes to see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from calque.traced import TracedModel
from tests.mutations import attention_mutations as attention
from tests.mutations import model_mutations as model
from tests.mutations.traced_gate import MODELS


@dataclass(frozen=True)
class Mutation:
    """``edit`` breaks a settled model. ``absent``: why a model has no such thing to break, by model.

    ``takes``: what a call must have for the fault to show where one forward of one unpadded prompt over an empty cache
    cannot show it: a cache, padding, a batch, or another length.
    """

    edit: Callable[[TracedModel], None]
    takes: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the edit."""
        return self.edit.__name__.replace("_", " ")

    @property
    def says(self) -> str:
        """What is wrong, in a sentence."""
        return (self.edit.__doc__ or "").strip()

    def broken(self, whole: TracedModel) -> TracedModel:
        """A copy of the model with the fault in it."""
        copied = whole.copy()
        self.edit(copied)
        copied.finish_rewrite()
        return copied


def on(names: str, why: str) -> dict[str, str]:
    """The fault exists on ``names`` alone; ``why`` it does not on the others."""
    return {name: why for name in MODELS if name not in names.split()}


def off(names: str, why: str) -> dict[str, str]:
    """The fault exists on all but ``names``."""
    return dict.fromkeys(names.split(), why)


ROTATED = "its positions are rotations: one more for all of them changes nothing"
LEARNED = "its positions are learned, nothing is rotated"
NO_WINDOW = "it has no sliding window"

MUTATIONS = (
    Mutation(attention.rope_off_by_one, absent=off("gpt2", LEARNED)),
    Mutation(attention.learned_position_off_by_one, absent=on("gpt2", ROTATED)),
    Mutation(attention.rope_base, absent=off("gpt2", LEARNED)),
    Mutation(attention.rope_reversed, absent=off("gpt2", LEARNED)),
    Mutation(attention.rope_interleaved, absent=off("gpt2", LEARNED)),
    Mutation(attention.stale_position, "cache"),
    Mutation(attention.position_by_slot, "padding"),
    Mutation(attention.mask_transposed),
    Mutation(attention.causality_one_too_wide),
    Mutation(attention.causality_dropped),
    Mutation(attention.own_slot_hidden),
    Mutation(attention.padding_ignored, "padding"),
    Mutation(attention.padding_taken_as_right, "padding"),
    Mutation(attention.mask_without_past, "cache"),
    Mutation(attention.mask_added_as_a_number),
    Mutation(attention.window_off_by_one, absent=on("gemma2 gemma3_text mixtral", NO_WINDOW)),
    Mutation(attention.window_ignored, absent=on("gemma2 gemma3_text mixtral", NO_WINDOW)),
    Mutation(attention.window_invented, absent=off("mixtral", "every layer has a window")),
    Mutation(attention.masks_exchanged, absent=on("gemma2 gemma3_text", "its layers share one mask")),
    Mutation(attention.keys_and_values_swapped),
    Mutation(attention.kv_heads_tiled, absent=off("gpt2", "it has as many key heads as query heads, none is repeated")),
    Mutation(attention.kv_heads_shifted),
    Mutation(attention.query_heads_swapped),
    Mutation(attention.scale_missing),
    Mutation(attention.scale_of_head_size, absent=on("gemma2 gemma3_text", "its scale is that of the head size")),
    Mutation(attention.softcap_dropped_or_invented),
    Mutation(model.final_softcap_dropped, absent=on("gemma2", "its logits are not capped")),
    Mutation(attention.sink_invented),
    Mutation(model.past_behind_new, "cache"),
    Mutation(model.cache_of_another_layer, "cache"),
    Mutation(model.batch_rows_mixed, "cache, batch"),
    Mutation(model.unrotated_keys_cached, "cache", off("gpt2", LEARNED)),
    # Seen without a cache: the gate checks that states grow.
    Mutation(model.present_before_update),
    Mutation(model.present_without_newest, "cache"),
    Mutation(model.presents_of_two_layers_swapped, "cache"),
    Mutation(model.present_key_and_value_swapped, "cache"),
    Mutation(model.one_weight_perturbed),
    Mutation(model.weights_of_two_layers_swapped),
    Mutation(model.norm_offset_wrong),
    Mutation(model.norm_epsilon),
    Mutation(model.query_and_key_norms_left_out, absent=on("qwen3 gemma3_text", "its queries and keys are not normalized")),
    Mutation(model.tied_head_untied),
    Mutation(model.embedding_scale_wrong),
    Mutation(model.residual_dropped),
    Mutation(model.activation_of_another_kind),
    Mutation(model.gate_and_up_swapped, absent=off("gpt2", "its MLP has no gate")),
    Mutation(model.routing_not_normalized, absent=on("mixtral", "it has no experts")),
    Mutation(model.one_expert_fewer, absent=on("mixtral", "it has no experts")),
    Mutation(model.experts_exchanged, absent=on("mixtral", "it has no experts")),
    Mutation(model.logits_one_position_late),
)

# Of phi3 alone, whose rotary frequencies change at a length.
LONGROPE = (
    Mutation(attention.long_frequencies, "length"),
    Mutation(attention.short_frequencies),
    Mutation(attention.frequencies_of_longest_row, "batch"),
    Mutation(attention.frequencies_of_each_token),
)


# What two models beside MODELS have not, or have in a form that the edit does not look for. BLOOM's attention is its own and stays ATen.
LACKING = {
    "gpt_oss": {
        "learned position off by one", "rope interleaved", "scale of head size", "final softcap dropped", "unrotated keys cached",
        "query and key norms left out", "activation of another kind", "gate and up swapped", "routing not normalized",
    },
    "bloom": {
        "rope off by one", "learned position off by one", "rope base", "rope reversed", "rope interleaved", "stale position",
        "position by slot", "mask added as a number", "window off by one", "window ignored", "masks exchanged", "keys and values swapped",
        "kv heads tiled", "kv heads shifted", "query heads swapped", "scale missing", "scale of head size", "softcap dropped or invented",
        "final softcap dropped", "sink invented", "past behind new", "cache of another layer", "batch rows mixed", "unrotated keys cached",
        "one weight perturbed", "weights of two layers swapped", "norm offset wrong", "query and key norms left out", "residual dropped",
        "gate and up swapped", "routing not normalized", "one expert fewer", "experts exchanged",
    },
}  # fmt: skip


def applicable(name: str) -> list[Mutation]:
    """The mutations that a model can have."""
    if name == "phi3":
        return list(LONGROPE)
    if name in LACKING:
        return [mutation for mutation in MUTATIONS if mutation.name not in LACKING[name]]
    return [mutation for mutation in MUTATIONS if name not in mutation.absent]
