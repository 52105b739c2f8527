"""The models of the table of compiled targets: the small ones that engines are built of, and larger ones for sizes and speed."""

from __future__ import annotations

from benchmarks.conversion.shapes import SHAPES
from benchmarks.engines import models as engines
from benchmarks.engines.models import GENERATION, SLOTS, Model, written

LLAMA_30M: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 1408, "vocab_size": 8192, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "MiniLM-L6", "vit", "quill")
# Of these, what runs on servers alone is measured.
LARGE = {"S (135M)": "S", "M (0.5B)": "M"}
MODELS = {
    **{name: engines.MODELS[name] for name in SMALL},
    "Llama 30M": Model(GENERATION, SLOTS, written(LLAMA_30M)),
    **{name: Model(GENERATION, SLOTS, written(SHAPES[shape].config())) for name, shape in LARGE.items()},
}
