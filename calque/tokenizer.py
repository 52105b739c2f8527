"""A tokenizer.json for models that come without one, made by transformers' own conversion, and held against the original."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.errors import SourceUnreadable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
# What transformers makes a tokenizer of, the likeliest first.
VOCABULARIES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
SENTENCEPIECE = ".model"
# Modules that conversions need, and what to install for each.
PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf", "tiktoken": "tiktoken"}
# Words, figures, runs of blanks, letters outside of any small vocabulary, symbols, a line break.
SAMPLES = ("The function returns 3 values, doesn't it?", "  two  blanks ", "naïve Straße 東京 🙂", "a\tb\nc", "x=[1.5e-3];")


def complete_tokenizer(source: Path, folder: Path, trust_remote_code: bool) -> str:
    """``folder`` holds a tokenizer.json if the model in ``source`` has a tokenizer that can be one; return what the user should know.

    A model without any tokenizer is left as it is, and so is one whose tokenizer cannot be converted: it runs on token ids.
    """
    if (source / FILE).is_file():
        return ""
    vocabulary = next((path for name in VOCABULARIES for path in sorted(source.glob(name)) if path.is_file()), None)
    if vocabulary is None:
        return ""
    try:
        made = _convert(source, vocabulary, trust_remote_code)
    except Exception as error:  # each tokenizer class fails as it likes on files that it does not know
        reason = " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
        return f"No {FILE} could be made of {vocabulary.name}: {reason}. The model runs on token ids.{_install(vocabulary)}"
    made.save(str(folder / FILE))
    others = _differing(made, vocabulary)
    warning = f" It splits {others[0]!r} otherwise than {vocabulary.name} itself: compare them before you rely on it." if others else ""
    return f"{FILE} was made of {vocabulary.name} by transformers.{warning}"


def load(folder: Path, trust_remote_code: bool) -> Tokenizer | None:
    """Return the tokenizer of the model in ``folder``, as its tokenizer.json has it or as transformers makes it; None without one.

    Raises:
        SourceUnreadable: it has one that cannot be read.
    """
    from tokenizers import Tokenizer

    vocabulary = next((path for name in (FILE, *VOCABULARIES) for path in sorted(folder.glob(name)) if path.is_file()), None)
    if vocabulary is None:
        return None
    try:
        made: Tokenizer = (
            Tokenizer.from_file(str(vocabulary)) if vocabulary.name == FILE else _convert(folder, vocabulary, trust_remote_code)
        )
    except Exception as error:  # the tokenizers library raises Exception itself, and conversions fail as they like
        reason = " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
        raise SourceUnreadable(f"{vocabulary} is no tokenizer that can be read: {reason}", fix="fetch it again") from error
    return made


def _convert(source: Path, vocabulary: Path, trust_remote_code: bool) -> Any:
    """Return the tokenizer of the model's class; where it has none, llama's if that is nearer to sentencepiece's own answers.

    transformers' class for models without one forgets the blank that sentencepiece puts before a text.
    """
    from transformers import AutoTokenizer, LlamaTokenizer, TokenizersBackend

    loaded = AutoTokenizer.from_pretrained(source, local_files_only=not trust_remote_code, trust_remote_code=trust_remote_code)
    made = getattr(loaded, "backend_tokenizer", None)
    if made is None:
        raise TypeError(f"{type(loaded).__name__} is none of the tokenizers library")
    if type(loaded) is TokenizersBackend and (others := _differing(made, vocabulary)):
        second = LlamaTokenizer.from_pretrained(source, local_files_only=True).backend_tokenizer
        return second if len(_differing(second, vocabulary)) < len(others) else made
    return made


def _install(vocabulary: Path) -> str:
    missing = [package for module, package in PACKAGES.items() if not _is_installed(module)]
    if vocabulary.suffix not in (SENTENCEPIECE, ".tiktoken") or not missing:
        return ""
    return f" It may need packages that are missing: pip install {' '.join(missing)}"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


def _differing(made: Any, vocabulary: Path) -> list[str]:
    """Return the samples that sentencepiece itself splits otherwise; none where the vocabulary is not of its making.

    Pieces are compared, not ids: some models number them anew.
    """
    if vocabulary.suffix != SENTENCEPIECE or not _is_installed("sentencepiece"):
        return []
    from sentencepiece import SentencePieceProcessor

    try:
        original = SentencePieceProcessor(model_file=str(vocabulary))
    except RuntimeError:  # transformers took it for a file of tiktoken
        return []
    pieces = {text: [original.id_to_piece(number) for number in original.encode(text)] for text in SAMPLES}
    return [text for text, expected in pieces.items() if expected != made.encode(text, add_special_tokens=False).tokens]
