"""A text as rows of tokens, each as the model's own tokenizer begins and ends one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calque.errors import SourceUnreadable, UsageError
from calque.tokenizer import load

if TYPE_CHECKING:
    from calque.source import ModelSource

Row = tuple[int, ...]

# What is read of a file: more tokens than any measurement takes.
MOST_CHARACTERS = 1 << 24
# Fewer tokens than this say nothing of a text.
FEWEST_TOKENS = 16
# Tokens of a row that a model is calibrated on, the marks included.
LENGTH = 256
# Text that the places of marks are found with: any will do.
PROBE = "a"


def read_text(path: Path) -> str:
    """Return the text of a file, the first 16 million characters of a longer one.

    Raises:
        UsageError: there is no such file, it cannot be read, or it is no UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS)
    except OSError as error:
        raise UsageError(f"the text {path} cannot be read: {error.strerror}", fix="name a file of plain text") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text: {error.reason} at byte {error.start}", fix="name a file of plain text in UTF-8") from error


def token_rows(folder: Path, text: str, longest: int, most: int, trust_remote_code: bool = False) -> list[Row]:
    """Return the text as consecutive rows of at most ``longest`` tokens, together about ``most``.

    Each row has the marks with which the tokenizer of the model in ``folder`` begins and ends a text.

    Raises:
        UsageError: the model has no tokenizer, or the text has too few tokens.
        SourceUnreadable: the tokenizer cannot be read.
    """
    ids, begin, end = _encoded(folder, text, trust_remote_code)
    room = max(1, longest - len(begin) - len(end))
    if len(ids) < FEWEST_TOKENS:
        raise UsageError(f"the text has {len(ids)} tokens, which say nothing of a model", fix=f"name one of at least {FEWEST_TOKENS}")
    # One row at least; a last row of a token or two would count little and cost a whole call.
    rows = [ids[start : start + room] for start in range(0, max(min(len(ids), most), 1), room)]
    kept = [row for row in rows if len(row) >= min(FEWEST_TOKENS, room)]
    return [(*begin, *row, *end) for row in kept]


def spread_rows(file: Path, source: ModelSource, count: int, longest: int | None) -> tuple[Row, ...]:
    """Return at most ``count`` rows of 256 tokens, or ``longest`` if that is less, spread evenly over the text in a file.

    A row has the tokenizer's marks. What is left over at the end of the text is not used.

    Raises:
        UsageError: no such file, no UTF-8, less text than one row, or a model without a tokenizer.
        SourceUnreadable: a tokenizer that cannot be read, or is not the model's.
    """
    ids, begin, end = _encoded(source.folder, read_text(file), source.trust_remote_code)
    length = min(LENGTH, longest or LENGTH) - len(begin) - len(end)
    if length < 1 or len(ids) < length:
        said = f"{file} is too short to calibrate on: {len(ids)} tokens, where a row has {length}"
        raise UsageError(said, fix="give a text of 100 kB or more")
    if (size := source.config.get_text_config().vocab_size) <= (largest := max(*ids, *begin, *end)):
        raise SourceUnreadable(
            f"the tokenizer gives token {largest}, the model of {source.id} knows {size}", fix="check that they belong together"
        )
    pieces = len(ids) // length
    starts = [length * (place * pieces // min(count, pieces)) for place in range(min(count, pieces))]
    return tuple((*begin, *ids[start : start + length], *end) for start in starts)


def _encoded(folder: Path, text: str, trust_remote_code: bool) -> tuple[list[int], Row, Row]:
    """Return the tokens of a text, and those that the model's tokenizer puts before and after one."""
    tokenizer = load(folder, trust_remote_code)
    if tokenizer is None:
        raise UsageError("a text was given, and the model has no tokenizer", fix="leave the text out")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    plain, whole = tokenizer.encode(PROBE, add_special_tokens=False).ids, tokenizer.encode(PROBE).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    begin, end = ((), ()) if at is None else (tuple(whole[:at]), tuple(whole[at + len(plain) :]))
    return tokenizer.encode(text, add_special_tokens=False).ids, begin, end
