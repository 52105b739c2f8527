"""Small causal language models for other tools: converted once, and what Calque's own runtime makes of some prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from calque.artifact import Artifact
from calque.pipeline import convert
from calque.random_weights import write_random_weights
from calque.recipe import Recipe
from calque.runtime import load, open_session
from calque.runtime.generate import GreedySequence
from tests.tiny_models import TYPES, Tiny, config_of

PADDING = 0
# Rows of different lengths; the longest passes the windows of 8 that the models have.
PROMPTS = [[5, 90, 17, 44, 100, 77, 30, 61, 12, 110, 7], [8, 3, 90], [150, 9, 33, 71, 18, 64]]
NEW = 12
END = 209

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
PLAIN = replace(TYPES["llama"], head_dim=16)
DECODERS = {
    **{name: TYPES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss")},
    **{name: replace(TYPES["llama"], model_type=name) for name in ("ernie4_5", "gemma", "granite", "hunyuan_v1_dense", "smollm3")},
    **{name: replace(PLAIN, model_type=name) for name in ("nemotron", "olmo", "phi")},
    "phimoe": Tiny("phimoe", head_dim=16, extra={**MOE, "sliding_window": 8}),
    "phi3-longrope": TYPES["phi3-longrope"],
}  # fmt: skip


def save_decoder(name: str, folder: Path, **shape: int) -> Path:
    """The folder holds a checkpoint with random weights whose ends and padding genai and optimum find in its config."""
    tiny = replace(DECODERS[name], **shape)  # type: ignore[arg-type]  # its numbers, by name
    config = config_of(replace(tiny, extra={**tiny.extra, "eos_token_id": END, "pad_token_id": PADDING}))
    config.save_pretrained(folder)
    write_random_weights(config, folder)
    return folder


def converted(model: str, out: Path, **settings: object) -> Artifact:
    return convert(Recipe.of({"model": model, "target": "onnxruntime", "parity": {"scenarios": ["single-prompt"]}, **settings}), out)


def own_tokens(folder: Path, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """What Calque's runtime continues each prompt with, each row alone."""
    artifact, session = load(folder), open_session(folder)
    return [[*GreedySequence(artifact, session, [*prompt]).tokens(new)] for prompt in prompts]


def until_end(rows: list[list[int]]) -> list[list[int]]:
    """The rows before their end token: some tools give it back, some do not, and fill what follows in a batch."""
    return [row[: row.index(END)] if END in row else row for row in rows]
