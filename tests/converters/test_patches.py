"""Each patch does what it says, and is still needed: a test fails on the day that upstream no longer needs it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.xglm.modeling_xglm import XGLMSinusoidalPositionalEmbedding

from calque.artifact import Limits
from calque.converters import patches, positions
from calque.converters.patches import PATCHES, Patch
from calque.shrink import shrunken
from tests.tiny_models import TYPES, Tiny, eager_model

THRESHOLD = 32
DYNAMIC = Tiny("llama", extra={"max_position_embeddings": 32, "rope_parameters": {
    "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}})  # fmt: skip
PER_KIND = replace(
    TYPES["gemma3_text"],
    extra={**TYPES["gemma3_text"].extra, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    }},
)  # fmt: skip


def patch(name: str) -> Patch:
    return next(row for row in PATCHES if row.name == name)


def rotary(tiny: Tiny, patched: bool) -> Any:
    model: Any = eager_model(tiny)
    if patched:
        patches.apply(model)
    return model.model.rotary_emb


def ragged_positions() -> Tensor:
    """A short row beside one that passes the threshold."""
    long = torch.arange(THRESHOLD + 8)
    return torch.stack([long.clamp_max(5), long])


def cos_sin(module: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = module(torch.zeros(len(positions), positions.shape[1], 64), positions)
    return cos, sin


def test_patches_have_a_reason_a_link_and_an_end() -> None:
    assert len({row.name for row in PATCHES}) == len(PATCHES)
    for row in PATCHES:
        assert all((row.reason, row.link, row.versions, row.expires))
        assert f"test_{row.name}_has_not_expired" in globals()


@pytest.mark.parametrize("row", [0, 1])
def test_longrope_of_a_row_equals_that_row_alone(row: int) -> None:
    positions = ragged_positions()
    together = cos_sin(rotary(TYPES["phi3-longrope"], patched=True), positions)
    alone = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions[row : row + 1])
    for batch, single in zip(together, alone, strict=True):
        torch.testing.assert_close(batch[row : row + 1], single, rtol=0, atol=0)


@pytest.mark.parametrize(("length", "long"), [(THRESHOLD - 1, False), (THRESHOLD, False), (THRESHOLD + 1, True)])
def test_longrope_changes_at_the_threshold_as_upstream(length: int, long: bool) -> None:
    positions = torch.arange(length)[None]
    patched = cos_sin(rotary(TYPES["phi3-longrope"], patched=True), positions)
    upstream = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions)
    assert torch.equal(patched[0], upstream[0])
    assert torch.equal(patched[1], upstream[1])
    beyond = cos_sin(rotary(TYPES["phi3-longrope"], patched=True), torch.arange(THRESHOLD + 1)[None])[0]
    assert torch.equal(patched[0][:, 1], beyond[:, 1]) == long


def test_longrope_per_row_has_not_expired() -> None:
    positions = ragged_positions()
    together, _ = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions)
    alone, _ = cos_sin(rotary(TYPES["phi3-longrope"], patched=False), positions[:1])
    assert not torch.equal(together[:1], alone), f"upstream now does this: {patch('longrope_per_row').expires}. Remove the patch"


def test_dynamic_ntk_constant_has_not_expired() -> None:
    module = rotary(DYNAMIC, patched=False)
    inputs = (torch.zeros(2, 5, 64), torch.arange(5).repeat(2, 1))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"x": {0: batch, 1: length}, "position_ids": {0: batch, 1: length}}
    # The day this does not raise, upstream can be exported: remove the patch.
    with pytest.raises((torch._dynamo.exc.UserError, RuntimeError), match=r"data-dependent|Could not guard"):
        torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def test_dynamic_ntk_equals_upstream_up_to_the_trained_length() -> None:
    positions = torch.arange(32)[None]
    patched, upstream = cos_sin(rotary(DYNAMIC, patched=True), positions), cos_sin(rotary(DYNAMIC, patched=False), positions)
    assert torch.equal(patched[0], upstream[0])
    assert torch.equal(patched[1], upstream[1])


@pytest.mark.parametrize(
    ("tiny", "limits", "used"),
    [
        (TYPES["llama"], Limits(), ()),
        (TYPES["phi3-longrope"], Limits(recompute_at=THRESHOLD), ("longrope_per_row",)),
        (DYNAMIC, Limits(max_length=32), ("dynamic_ntk_constant",)),
        (PER_KIND, Limits(max_length=128), ("dynamic_ntk_constant",)),
    ],
    ids=["none", "longrope", "dynamic", "dynamic-of-one-kind"],
)
def test_patches_apply_where_they_are_needed_and_limit_the_artifact(tiny: Tiny, limits: Limits, used: tuple[str, ...]) -> None:
    assert patches.apply(eager_model(tiny)) == (limits, used)


def eager(name: str, **fields: Any) -> Any:
    """An untouched shrunken model with weights that tell positions apart."""
    config = shrunken(name, causal=True)
    for field, value in fields.items():
        setattr(config, field, value)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def replaced(row: Patch) -> Any:
    assert row.replacement is not None
    return row.replacement


def module_of(model: Any, name: str) -> Any:
    return next(module for module in model.modules() if patch(name).where(module))


def last_logits(model: Any, ids: Tensor, mask: Tensor, given: bool) -> Tensor:
    """The logits of the last token; positions are given by name where the model takes them and ``given`` is true."""
    places = mask.cumsum(1) - 1
    takes = given and "position_ids" in inspect.signature(type(model).forward).parameters
    with torch.no_grad(), positions.known(places, mask):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **({"position_ids": places} if takes else {})).logits[
            :, -1
        ]
    return logits


# A row with a gap, as the cache has after a right-padded prompt: the last token is what it is without the gap.
GAPS = {
    "position_table_by_position": ("bart", {}),
    "positions_after_padding_index": ("roberta", {}),
    "temperature_by_position": ("llama4_text", {"attention_chunk_size": 64, "floor_scale": 2}),
    "alibi_by_position": ("mpt", {}),
    "local_attention_by_position": ("gpt_neo", {}),
}


@pytest.mark.parametrize("name", GAPS)
def test_patched_row_with_a_gap_equals_the_row_without_it(name: str) -> None:
    model_type, fields = GAPS[name]
    tokens = torch.randint(4, 200, (1, 12), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([tokens[:, :5], torch.zeros(1, 6, dtype=torch.int64), tokens[:, 5:]], 1)
    mask = torch.cat([torch.ones(1, 5, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 7, dtype=torch.int64)], 1)
    model = eager(model_type, **fields)
    alone = last_logits(model, tokens, torch.ones_like(tokens), given=False)
    unpatched = last_logits(model, ids, mask, given=True)
    assert (unpatched - alone).abs().max() > 1e-3 * alone.std(), f"upstream now does this: {patch(name).expires}. Remove the patch"
    assert name in patches.apply(model)[1]
    torch.testing.assert_close(last_logits(model, ids, mask, given=True), alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_logits(model, tokens, torch.ones_like(tokens), given=True), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bart", "blenderbot", "marian", "pegasus", "whisper", "xglm"])
def test_patched_position_table_gives_upstreams_rows(model_type: str) -> None:
    name = "position_table_of_fixed_length" if model_type == "xglm" else "position_table_by_position"
    module, row = module_of(eager(model_type), name), patch(name)
    ids = torch.arange(6)[None]
    expected = module(ids if model_type in ("bart", "whisper", "xglm") else ids.shape)
    with positions.known(ids, torch.ones_like(ids)):
        assert torch.equal(replaced(row)(module, ids).squeeze(0), expected.squeeze(0))


def test_position_table_by_position_has_not_expired() -> None:
    assert "position_ids" not in inspect.signature(transformers.BartForCausalLM.forward).parameters, "remove the patch"


def test_position_table_of_fixed_length_has_not_expired() -> None:
    assert hasattr(XGLMSinusoidalPositionalEmbedding, "make_weights"), "remove the patch"


def test_positions_after_padding_index_has_not_expired() -> None:
    module = module_of(eager("roberta"), "positions_after_padding_index")
    ids = torch.arange(4, 9)[None]
    assert not torch.equal(module(ids), module(ids, position_ids=torch.arange(5)[None])), "remove the patch"
    assert torch.equal(module(ids), replaced(patch("positions_after_padding_index"))(module, ids, position_ids=torch.arange(5)[None]))


def test_temperature_by_position_has_not_expired() -> None:
    source = inspect.getsource(type(module_of(eager("llama4_text"), "temperature_by_position")).forward)
    assert "past_seen_tokens" in source, "upstream no longer counts slots: remove the patch"


def test_alibi_by_position_has_not_expired() -> None:
    parameters = inspect.signature(transformers.MptModel.build_mpt_alibi_tensor).parameters
    assert "attention_mask" not in parameters, "upstream builds its bias from the mask: remove the patch"


def test_local_attention_by_position_has_not_expired() -> None:
    assert "self.bias" in inspect.getsource(GPTNeoSelfAttention.__init__), "remove the patch"


def test_gaussian_quantile_constant_has_not_expired() -> None:
    assert "icdf" in inspect.getsource(Gemma3nTextMLP._gaussian_topk), "remove the patch"


def test_gaussian_quantile_is_upstreams() -> None:
    module = module_of(eager("gemma3n_text"), "gaussian_quantile_constant")
    module.activation_sparsity = 0.95
    inputs = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(patches.gaussian_top_forward(module, inputs), module._gaussian_topk(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "model_type"), [("dbrx_every_expert", "dbrx"), ("longcat_every_expert", "longcat_flash")])
def test_every_expert_on_every_token_is_upstreams_mixture(name: str, model_type: str) -> None:
    module = module_of(eager(model_type), name)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 5, 64, generator=generator)
    tokens = hidden if model_type == "dbrx" else hidden.reshape(-1, 64)
    experts = getattr(module, "total_experts", None) or module.num_experts
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, generator=generator)
    with torch.no_grad():
        expected, got = module(tokens, index, weights), replaced(patch(name))(module, tokens, index, weights)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_aria_batch_kept_whole_is_upstreams_layer() -> None:
    module = module_of(eager("aria_text"), "aria_batch_kept_whole")
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(replaced(patch("aria_batch_kept_whole"))(module, hidden), module(hidden), rtol=1e-5, atol=1e-5)


def test_aria_batch_kept_whole_has_not_expired() -> None:
    source = inspect.getsource(type(module_of(eager("aria_text"), "aria_batch_kept_whole")).forward)
    assert "self.shared_experts(hidden_states.view(original_shape))" in source, "remove the patch"


def test_dbrx_every_expert_has_not_expired() -> None:
    assert not transformers.DbrxForCausalLM._can_set_experts_implementation(), "remove the patch"


def test_jetmoe_unsorted_is_upstreams_mixture() -> None:
    model = eager("jetmoe")
    mixture = next(module for module in model.modules() if type(module).__name__ == "JetMoeMoE")
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = mixture(hidden)
        assert patches.apply(model)[1] == ("jetmoe_routing_unsorted", "jetmoe_every_expert")
        torch.testing.assert_close(mixture(hidden), expected, rtol=1e-5, atol=1e-5)


def test_jetmoe_routing_unsorted_has_not_expired() -> None:
    source = inspect.getsource(type(module_of(eager("jetmoe"), "jetmoe_routing_unsorted")).forward)
    assert "tolist" in source, "remove the patch"


def test_jetmoe_every_expert_has_not_expired() -> None:
    source = inspect.getsource(type(module_of(eager("jetmoe"), "jetmoe_every_expert")).forward)
    assert "split(expert_size" in source, "remove the patch"


def test_longcat_every_expert_has_not_expired() -> None:
    assert not transformers.LongcatFlashForCausalLM._can_set_experts_implementation(), "remove the patch"


def test_sines_by_slot_has_not_expired() -> None:
    assert "position_ids" not in inspect.signature(transformers.RoFormerForCausalLM.forward).parameters, "remove the patch"


def test_model_that_counts_slots_without_a_way_in_is_limited_to_unpadded_rows() -> None:
    assert patches.apply(eager("roformer")) == (Limits(padding="none", max_length=128), ("sines_by_slot",))


def test_mask_widened_for_images_has_not_expired() -> None:
    model = eager("git")
    tokens = torch.randint(4, 200, (1, 7), generator=torch.Generator().manual_seed(4))
    padded, cache = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], 1), transformers.DynamicCache()
    mask = (torch.arange(10) >= 3).long()[None]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = model(input_ids=tokens, use_cache=False).logits[:, -1]
        whole = model(input_ids=padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1]
        model(input_ids=padded[:, :9], attention_mask=mask[:, :9], position_ids=places[:, :9], past_key_values=cache, use_cache=True)
        step = model(input_ids=padded[:, 9:], attention_mask=mask, position_ids=places[:, 9:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    # The day this is equal, upstream no longer counts an image that is not there: remove the patch.
    assert (step.logits[:, -1] - alone).abs().max() > 1e-3 * alone.std()
