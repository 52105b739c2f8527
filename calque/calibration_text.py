"""Rows of tokens out of a text file, for what a model is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calque import tokenizer
from calque.errors import SourceUnreadable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from calque.source import ModelSource

# Tokens of a row, the tokenizer's own included.
LENGTH = 256
# Token that the places of those around a text are found with: any will do.
PROBE = "a"

Rows = tuple[tuple[int, ...], ...]


def read_rows(file: Path, source: ModelSource, count: int, longest: int | None) -> Rows:
    """Return at most ``count`` rows of 256 tokens, or ``longest`` if that is less, spread evenly over the text.

    A row begins and ends with what the model's tokenizer puts around a text. What is left over at the end of the text is not used.

    Raises:
        SourceUnreadable: no such file, no UTF-8, less text than one row, or a model without a tokenizer.
    """
    text = _text(file)
    made = _tokenizer(source)
    before, after = _around(made)
    length = min(LENGTH, longest or LENGTH) - len(before) - len(after)
    ids = made.encode(text, add_special_tokens=False).ids
    if length < 1 or len(ids) < length:
        raise SourceUnreadable(
            f"{file} is too short to calibrate on: {len(ids)} tokens, where a row has {length}", fix="give a text of 100 kB or more"
        )
    if (size := source.config.get_text_config().vocab_size) <= (largest := max(*ids, *before, *after)):
        raise SourceUnreadable(
            f"the tokenizer gives token {largest}, the model of {source.id} knows {size}", fix="check that they belong together"
        )
    pieces = len(ids) // length
    starts = [length * (place * pieces // min(count, pieces)) for place in range(min(count, pieces))]
    return tuple((*before, *ids[start : start + length], *after) for start in starts)


def _text(file: Path) -> str:
    fix = "calibration takes a text file in UTF-8"
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceUnreadable(f"{file} cannot be read: {error.strerror}", fix=fix) from error
    except UnicodeDecodeError as error:
        raise SourceUnreadable(f"{file} is no text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}", fix=fix) from error


def _tokenizer(source: ModelSource) -> Tokenizer:
    found = tokenizer.load(source.folder, source.trust_remote_code)
    if found is None:
        raise SourceUnreadable(f"{source.id} has no tokenizer, and a text is calibrated on as tokens", fix="leave `calibration` out")
    found.no_truncation()
    found.no_padding()
    return found


def _around(made: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and after a text."""
    whole, alone = made.encode(PROBE).ids, made.encode(PROBE, add_special_tokens=False).ids
    start = next(at for at in range(len(whole) - len(alone) + 1) if whole[at : at + len(alone)] == alone)
    return whole[:start], whole[start + len(alone) :]
