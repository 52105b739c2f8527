"""Faults of the cache, of weights and of the blocks around attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import gelu

from calque.traced import TracedModel, user_nodes
from calque.weights import Derived, Weight, torch_dtype_name
from tests.mutations.graph_edits import (
    above,
    aten,
    attentions,
    below,
    caches,
    computed,
    feed,
    joined,
    node_of,
    outputs,
    replace_by,
    return_instead,
)

# What most configs say, and what a converter that does not read the config takes.
USUAL_EPSILON = 1e-6


def past_behind_new(model: TracedModel) -> None:
    """Layer 1 puts new keys and values ahead of the past."""
    for cache in caches(model, 1):
        past, new = joined(cache)
        cache.args = ([new, past], *cache.args[1:])


def cache_of_another_layer(model: TracedModel) -> None:
    """Layer 1 goes on from the past of layer 0."""
    for cache, other in zip(caches(model, 1), caches(model, 0), strict=True):
        cache.args = ([joined(other)[0], joined(cache)[1]], *cache.args[1:])


def batch_rows_mixed(model: TracedModel) -> None:
    """Each row goes on from the past of the row before it, in layer 1."""
    for cache in caches(model, 1):
        past, new = joined(cache)
        with model.graph.inserting_before(cache):
            rolled = model.graph.call_function(torch.roll, (past, 1, 0))
        cache.args = ([rolled, new], *cache.args[1:])


def unrotated_keys_cached(model: TracedModel) -> None:
    """Layer 1 returns keys as they were before RoPE, and uses them as if rotated."""
    past, new = joined(caches(model, 1)[0])
    plain = node_of(node_of(new.args[0]).args[0])
    return_instead(model, {"present.1.key": computed(model, torch.cat, [past, plain], 2)})


def present_before_update(model: TracedModel) -> None:
    """Layer 1 returns the past it was given."""
    past = model.placeholders()
    return_instead(model, {f"present.1.{kind}": past[f"past_key_values.1.{kind}"] for kind in ("key", "value")})


def newest_slots_empty(whole: Tensor, past: Tensor) -> Tensor:
    return torch.cat([past, torch.zeros_like(whole[:, :, past.shape[2] :])], dim=2)


def present_without_newest(model: TracedModel) -> None:
    """Layer 1 returns its cache grown, with nothing in the new slots."""
    past, present = model.placeholders(), outputs(model)
    for kind in ("key", "value"):
        name = f"present.1.{kind}"
        return_instead(model, {name: computed(model, newest_slots_empty, present[name], past[f"past_key_values.1.{kind}"])})


def presents_of_two_layers_swapped(model: TracedModel) -> None:
    """Layers 0 and 1 return each other's keys and values."""
    present = outputs(model)
    names = [f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    return_instead(model, {name: present[other] for name, other in zip(names, names[2:] + names[:2], strict=True)})


def present_key_and_value_swapped(model: TracedModel) -> None:
    """Layer 1 returns its values under the name of its keys and the reverse."""
    present = outputs(model)
    return_instead(model, {"present.1.key": present["present.1.value"], "present.1.value": present["present.1.key"]})


def change_weight(model: TracedModel, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """The table reads ``name`` as ``change`` of what it was; names tied to it stay tied."""
    before = model.weights[name]
    changed = Derived((before,), "mutation", change, torch_dtype_name(before), before.shape)
    for other in [name, *model.weights.tied(name)]:
        model.weights.entries[other] = changed


def weight_named(model: TracedModel, ending: str) -> str:
    """The one parameter whose name ends so."""
    [name] = [name for name in model.weights.entries if name.endswith(ending)]
    return name


def attention_output_weights(model: TracedModel) -> list[str]:
    """The output projection of each layer's attention."""
    found = [name for name in model.weights.entries if name.endswith(("o_proj.weight", "attn.c_proj.weight"))]
    return sorted(found)


def largest_element_perturbed(weight: Tensor) -> Tensor:
    changed = weight.clone()
    changed.view(-1)[changed.abs().argmax()] *= 1.01
    return changed


def one_weight_perturbed(model: TracedModel) -> None:
    """One element, the largest, of one output projection is 1 % off."""
    change_weight(model, attention_output_weights(model)[1], largest_element_perturbed)


def weights_of_two_layers_swapped(model: TracedModel) -> None:
    """Layers 0 and 1 read each other's output projection."""
    one, other, *_ = attention_output_weights(model)
    entries = model.weights.entries
    entries[one], entries[other] = entries[other], entries[one]


def one_more(weight: Tensor) -> Tensor:
    return weight + 1


def one_less(weight: Tensor) -> Tensor:
    return weight - 1


def norm_offset_wrong(model: TracedModel) -> None:
    """The norm before layer 1's attention has 1 added to its weight where the model adds none, or the reverse."""
    endings = ("layers.1.input_layernorm.weight", "h.1.ln_1.weight")
    [name] = [name for name in model.weights.entries if name.endswith(endings)]
    adds_one = any(user.target is aten.add.Tensor for user in model.parameters()[name].users)
    change_weight(model, name, one_less if adds_one else one_more)


def drawn_anew(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std()


def tied_head_untied(model: TracedModel) -> None:
    """The head has weights of its own, drawn anew, as a loader leaves what no checkpoint names."""
    head = above(outputs(model)["logits"], aten.linear.default)[0]
    tied = node_of(head.args[1])
    [name] = [name for name, node in model.parameters().items() if node is tied]
    before: Weight = model.weights[name]
    made = model.add_parameter("untied.weight", Derived((before,), "mutation", drawn_anew, "float32", before.shape), like=tied)
    head.args = (head.args[0], made)


def norm_epsilon(model: TracedModel) -> None:
    """Every norm has epsilon 1e-6, or 1e-5 where that is the model's own."""
    found = 0
    for node in list(model.graph.nodes):
        if node.target is aten.layer_norm.default:
            node.args = (*node.args[:4], _another(float(node.args[4])), *node.args[5:])
        elif node.target is aten.rsqrt.default:
            shifted = node_of(node.args[0])
            shifted.args = (shifted.args[0], _another(float(shifted.args[1])))  # type: ignore[arg-type]
        else:
            continue
        found += 1
    assert found


def _another(epsilon: float) -> float:
    return USUAL_EPSILON if epsilon != USUAL_EPSILON else 1e-5


def embedding_scale_wrong(model: TracedModel) -> None:
    """Token embeddings are multiplied by √hidden where the model does not, or the reverse."""
    tokens = user_nodes(list(model.graph.nodes), aten.embedding.default)[0]
    scaled = next(iter(tokens.users))
    if any("embed_scale" in argument.name for argument in scaled.all_input_nodes):
        scaled.replace_all_uses_with(tokens)
    else:
        replace_by(model, tokens, torch.mul, tokens, tokens.meta["val"].shape[-1] ** 0.5)


def residual_dropped(model: TracedModel) -> None:
    """What came into layer 1 is not added to what its attention gives."""
    after = below(attentions(model)[1])
    added = next(n for n in after if n.target is aten.add.Tensor and isinstance(n.args[1], Node) and n.meta["val"].dim() == 3)
    [branch] = [argument for argument in added.all_input_nodes if argument in after]
    added.replace_all_uses_with(branch)


def activation_of_another_kind(model: TracedModel) -> None:
    """The last layer's GELU is exact where the model's is the tanh approximation; SiLU becomes GELU."""
    nodes = list(model.graph.nodes)
    if found := user_nodes(nodes, aten.gelu.default):
        found[-1].kwargs = {"approximate": "none"}
    elif found := user_nodes(nodes, aten.silu.default):
        replace_by(model, found[-1], gelu, found[-1].args[0])
    else:  # gpt2 writes its approximation out: 0.5 x (1 + tanh(…))
        product = next(n for n in below(user_nodes(nodes, aten.tanh.default)[-1]) if n.target is aten.mul.Tensor)
        replace_by(model, product, gelu, node_of(product.args[0]).args[0])


def gate_and_up_swapped(model: TracedModel) -> None:
    """The activation of the last layer is taken of the other projection."""
    nodes = list(model.graph.nodes)
    activation = [*user_nodes(nodes, aten.silu.default), *user_nodes(nodes, aten.gelu.default)][-1]
    [product] = activation.users
    up = next(argument for argument in product.all_input_nodes if argument is not activation)
    gate = node_of(activation.args[0])
    with model.graph.inserting_before(product):
        other = model.graph.call_function(activation.target, (up,), activation.kwargs)  # type: ignore[arg-type]
    product.args = (other, gate)


def query_and_key_norms_left_out(model: TracedModel) -> None:
    """Queries and keys of layer 1 are not normalized."""
    for kind in ("q_norm", "k_norm"):
        weight = model.parameters()[weight_named(model, f"layers.1.self_attn.{kind}.weight")]
        normalized = next(node for node in below(weight) if node.target is aten.mul.Tensor)
        squared = above(normalized, aten.pow.Tensor_Scalar)[0]
        normalized.replace_all_uses_with(node_of(squared.args[0]))


def final_softcap_dropped(model: TracedModel) -> None:
    """The logits are not capped."""
    head = above(outputs(model)["logits"], aten.linear.default)[0]
    return_instead(model, {"logits": head})


def routing_not_normalized(model: TracedModel) -> None:
    """The weights of the chosen experts do not add up to 1."""
    for chosen in user_nodes(list(model.graph.nodes), aten.div.Tensor):
        chosen.replace_all_uses_with(node_of(chosen.args[0]))


def one_expert_fewer(model: TracedModel) -> None:
    """Each token goes to its best expert alone."""
    for chosen in user_nodes(list(model.graph.nodes), aten.topk.default):
        chosen.args = (chosen.args[0], 1, *chosen.args[2:])


def rolled_by_one(weight: Tensor) -> Tensor:
    return weight.roll(1, 0)


def experts_exchanged(model: TracedModel) -> None:
    """Each expert of layer 1 has the output projection of the one before it."""
    change_weight(model, weight_named(model, "layers.1.mlp.experts.down_proj"), rolled_by_one)


def one_position_late(logits: Tensor) -> Tensor:
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def logits_one_position_late(model: TracedModel) -> None:
    """Logits are those of the position before, except at the first of a call."""
    feed(model, node_of(outputs(model)["logits"]), 0, one_position_late)
