"""Mixtures whose code loops over the experts that were hit, which no graph can: every expert on every token instead.

Exact, and of no data-dependent shape, as ``semantic.all_experts`` is for the models that let transformers choose. A token's
routing weight for an expert that it did not choose is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def routing(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Return each expert's weight for each token, [E, T, 1], from the chosen ones, [T, K]."""
    chosen = index.unsqueeze(-1) == torch.arange(experts, device=index.device)
    return (chosen.to(weights.dtype) * weights.unsqueeze(-1)).sum(1).transpose(0, 1).unsqueeze(-1)


def aria_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """Return Aria's layer, [B, S, H]: the routed experts see a list of tokens, the shared ones the batch as it came."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, weights, index = module.router(tokens)
    routed: Tensor = module.experts(tokens, index, weights)
    shared: Tensor = module.shared_experts(hidden_states)
    return routed.reshape(hidden_states.shape) + shared


def dbrx_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return DBRX's mixture, [B, S, H]; its experts are one matrix, [E · F, H]."""
    batch, length, size = hidden_states.shape
    tokens = hidden_states.reshape(1, -1, size)
    first, gate, second = (weight.view(-1, module.ffn_hidden_size, size) for weight in (module.mlp.w1, module.mlp.v1, module.mlp.w2))
    inner = module.mlp.activation_fn(torch.matmul(tokens, first.transpose(1, 2))) * torch.matmul(tokens, gate.transpose(1, 2))
    out = torch.matmul(inner, second) * routing(top_k_index, top_k_weights, module.num_experts)
    return out.sum(0).reshape(batch, length, size)


def jetmoe_router_forward(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return JetMoE's routing with the T · K choices in the tokens' own order, and in place of group sizes each one's expert."""
    logits = module.layer(hidden_states).float()
    chosen, experts = logits.topk(module.top_k, dim=1)
    gates = torch.softmax(chosen, dim=1).type_as(hidden_states).flatten()
    order = torch.arange(hidden_states.shape[0] * module.top_k, device=hidden_states.device)
    return order, order // module.top_k, gates, experts.flatten(), logits


def jetmoe_experts_forward(module: Any, inputs: Tensor, experts: Tensor) -> Tensor:
    """Return each row, [T · K, In], through its own expert of ``experts``, [T · K], as [T · K, Out]."""
    out = torch.matmul(inputs.unsqueeze(0), module.weight.transpose(1, 2))
    mixed: Tensor = (out * routing(experts.unsqueeze(1), torch.ones_like(inputs[:, :1]), module.num_experts)).sum(0)
    return mixed


def longcat_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return LongCat-Flash's mixture, [T, H]; the experts past ``num_routed_experts`` give the token back."""
    weights = routing(top_k_index, top_k_weights, module.total_experts)
    routed = module.num_routed_experts
    gate, up = torch.matmul(hidden_states.unsqueeze(0), module.gate_up_proj[:routed].transpose(1, 2)).chunk(2, dim=-1)
    out = torch.matmul(module.act_fn(gate) * up, module.down_proj.transpose(1, 2)) * weights[:routed]
    mixed: Tensor = out.sum(0) + hidden_states * weights[routed:].sum(0)
    return mixed
