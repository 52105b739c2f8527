"""What travels into an artifact besides the weights: tokenizer, templates, image processor, configs, and the licence."""

from __future__ import annotations

from pathlib import Path

import yaml

from calque import sentence

CONFIG = "config.json"
CARD = "README.md"
# What is done to an image before the model sees it: resized, cut, scaled.
PREPROCESSOR = "preprocessor_config.json"


def _any_case(name: str) -> str:
    """Return the pattern that matches ``name`` in any case of its letters; case-insensitive globbing came with Python 3.12."""
    return "".join(f"[{letter.upper()}{letter.lower()}]" if letter.isalpha() else letter for letter in name)


LICENCES = tuple(_any_case(name) + "*" for name in ("license", "licence", "copying", "notice", "use_policy"))

# Source: the file names that transformers' save_pretrained writes, and the licence files of the hub's largest families.
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    sentence.MODULES,
    "*_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "added_tokens.json",
    "chat_template.*",
    PREPROCESSOR,
    "processor_config.json",
    "additional_chat_templates/*.jinja",
    *LICENCES,
)


def companion_files(folder: Path) -> list[Path]:
    """Return the companions in ``folder``, sorted; not resolved, for what the hub's cache links to has no telling name."""
    return _matching(folder, COMPANIONS)


def licence_note(folder: Path) -> str:
    """Return a sentence that says which licence the model card states, where no licence file came with the model; else nothing."""
    if any(path.name.lower().startswith(("licen", "copying")) for path in _matching(folder, LICENCES)):
        return ""
    card = _front_matter(folder / CARD)
    named = card.get("license")
    if named == "other":
        named = card.get("license_name") or named
    names = [str(name) for name in (named if isinstance(named, list) else [named]) if name]
    if not names:
        return ""
    link = card.get("license_link")
    return f"The model card states the licence {', '.join(names)}{f' ({link})' if link else ''}; no licence file came with the model."


def _front_matter(card: Path) -> dict[str, object]:
    """Return the YAML between the first two lines of dashes of a model card; nothing where there is none that can be read."""
    try:
        text = card.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    rest = [line.strip() for line in lines[1:]]
    if "---" not in rest:
        return {}
    try:
        table = yaml.safe_load("\n".join(lines[1 : 1 + rest.index("---")]))
    except (yaml.YAMLError, ValueError):  # a date that does not exist is a ValueError
        return {}
    return table if isinstance(table, dict) else {}


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
