"""The model's shape, and its weights kept in full precision beside the bfloat16 copy that computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quill.vocabulary import BEGIN, CONTEXT, END, PAD, VOCABULARY

Objective = Callable[[Tensor], Tensor]


def shape() -> LlamaConfig:
    """Return the configuration; every width is a multiple of 64, so that blockwise quantisation has whole blocks."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
        use_cache=True,
    )


def fresh(seed: int) -> LlamaForCausalLM:
    """Return an untrained network in float32, the same for the same seed."""
    torch.manual_seed(seed)
    network = LlamaForCausalLM(shape())
    network.set_attn_implementation("eager")
    return network


class Master:
    """Full-precision weights that the optimiser moves; the network itself holds their bfloat16 rounding."""

    def __init__(self, network: LlamaForCausalLM) -> None:
        """Take the weights of a float32 network over and turn the network into bfloat16."""
        self.names = [name for name, _ in network.named_parameters()]
        self.weights = [nn.Parameter(weight.detach().clone()) for weight in network.parameters()]
        self.network = nn.Module.to(network, torch.bfloat16)

    def optimiser(self, rate: float) -> torch.optim.AdamW:
        """Return AdamW over the weights; gains of norms are not decayed."""
        matrices = [weight for weight in self.weights if weight.ndim > 1]
        gains = [weight for weight in self.weights if weight.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)

    def step(self, optimiser: torch.optim.Optimizer) -> float:
        """Move the weights by the network's gradients, clipped to norm one; return the norm before clipping."""
        for weight, copy in zip(self.weights, self.network.parameters(), strict=True):
            weight.grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        optimiser.step()
        self.publish()
        return float(norm)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the weights into the network."""
        for weight, copy in zip(self.weights, self.network.parameters(), strict=True):
            copy.copy_(weight)

    def state(self) -> dict[str, Tensor]:
        """Return the full-precision weights by name."""
        return {name: weight.detach() for name, weight in zip(self.names, self.weights, strict=True)}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take weights over that ``state`` gave earlier."""
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(state[name])
        self.publish()


def objective(network: LlamaForCausalLM, compiled: bool) -> Objective:
    """Return the mean loss of a batch of windows, each one token longer than the context it trains."""

    def loss(windows: Tensor) -> Tensor:
        logits = network(input_ids=windows[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    # Reads of intermediate values dominate at this width; fusing them nearly doubles the speed on a processor.
    return torch.compile(loss, dynamic=False) if compiled else loss
