"""The models that engines are built of: a small one of each type, the built-in one, and a decoder of 135M parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.conversion.shapes import SHAPES

GENERATION, CLASSIFICATION = "text-generation-with-past", "image-classification"
BUILT_IN = "builtin:quill"
SLOTS = 64


@dataclass(frozen=True)
class Model:
    """One model: its task, the slots of its cache (0: it has none), and what leaves its config in a folder; None: it is built in."""

    task: str
    slots: int
    save: Callable[[Path], object] | None

    def source(self, folder: Path) -> list[str]:
        """Return the arguments of ``calque convert`` that name it, its config being in ``folder``."""
        if self.save is None:
            return [BUILT_IN]
        self.save(folder)
        if self.task != CLASSIFICATION:
            save_tokenizer(folder)
        return [str(folder / "config.json"), "--random-weights", "--task", self.task]


def save_tokenizer(folder: Path) -> None:
    """The folder holds a tokenizer of single printable characters, which the smallest vocabulary has room for."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    characters = [chr(code) for code in range(32, 127)]
    # The first ids are those of marks.
    tokenizer = Tokenizer(WordLevel({"?" * 3: 4, **{character: 5 + at for at, character in enumerate(characters)}}, unk_token="?" * 3))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


def shrunken(model_type: str) -> Callable[[Path], object]:
    """Return what saves the small config of a type, as the conformance sweep makes it."""

    def save(folder: Path) -> object:
        from calque import shrink

        return shrink.shrunken(model_type, causal=model_type != "vit").save_pretrained(folder)

    return save


def written(table: dict[str, object]) -> Callable[[Path], object]:
    """Return what saves a config that is given as a table."""

    def save(folder: Path) -> object:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "config.json").write_text(json.dumps(table), encoding="utf-8")

    return save


# all-MiniLM-L6-v2 as it was released, of 22.7M parameters.
MINILM: dict[str, object] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522, "pad_token_id": 0,
}  # fmt: skip

MODELS = {
    **{name: Model(GENERATION, SLOTS, shrunken(name)) for name in ("llama", "qwen3", "gemma3_text", "phi3", "gpt2")},
    "MiniLM-L6": Model("feature-extraction", 0, written(MINILM)),
    "vit": Model(CLASSIFICATION, 0, shrunken("vit")),
    "quill": Model(GENERATION, SLOTS, None),
    "S (135M)": Model(GENERATION, 512, written(SHAPES["S"].config())),
}
