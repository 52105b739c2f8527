"""Shapes of the checkpoints that are converted: configurations of Llama and Qwen2, without weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a model type has beyond its sizes: the class in its config, keys that only it has, and what carries a bias."""

    architecture: str
    config: dict[str, Any]
    biased: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"rms_norm_eps": 1e-06, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21},
        biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint; ``tied``: the head is the table of embeddings."""

    description: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    max_position: int
    rope_theta: float
    model_type: str = "llama"
    rope_scaling: dict[str, Any] | None = None
    tied: bool = True

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """Return config.json in the keys that transformers 4 and 5 both read; the token ids are those of quill's tokenizer."""
        family = FAMILIES[self.model_type]
        return {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            **family.config,
            **({"rope_scaling": self.rope_scaling} if self.rope_scaling else {}),
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": self.deviation,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_position,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the random weights: what SmolLM2 begins from, 1/sqrt(hidden)."""
        return round(math.sqrt(1 / self.hidden), 6)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by the name transformers gives it; a tied lm_head is not stored."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        keys = self.kv_heads * self.head_dim
        for layer in range(self.layers):
            for name, shape in {
                "input_layernorm": (self.hidden,),
                "post_attention_layernorm": (self.hidden,),
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (keys, self.hidden),
                "self_attn.v_proj": (keys, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "mlp.gate_proj": (self.intermediate, self.hidden),
                "mlp.up_proj": (self.intermediate, self.hidden),
                "mlp.down_proj": (self.hidden, self.intermediate),
            }.items():
                shapes[f"model.layers.{layer}.{name}.weight"] = shape
                if name in FAMILIES[self.model_type].biased:
                    shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        return shapes


LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# S: https://huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json; M: https://huggingface.co/Qwen/Qwen2.5-0.5B, config.json;
# L: https://huggingface.co/meta-llama/Llama-3.2-1B, config.json.
# XL: https://huggingface.co/meta-llama/Llama-3.1-8B, config.json, for memory alone.
# XS only tries whether every tool works.
SHAPES = {
    "S": Shape("Llama, SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, 8192, 100000.0),
    "M": Shape("Qwen2, Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151936, 32768, 1000000.0, "qwen2"),
    "L": Shape("Llama, Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, 131072, 500000.0, rope_scaling=LLAMA3),
    "XL": Shape(
        "Llama, Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256, 131072, 500000.0, rope_scaling={**LLAMA3, "factor": 8.0}, tied=False
    ),
    "XS": Shape("Llama, two small layers", 2, 64, 128, 4, 2, 4096, 1024, 10000.0),
}
