"""A text as rows of tokens, each as the model's own tokenizer begins and ends one."""

from __future__ import annotations

from pathlib import Path

from calque.errors import UsageError
from calque.tokenizer import FILE, complete_tokenizer

# What is read of a file: more tokens than any measurement takes.
MOST_CHARACTERS = 1 << 24
# Fewer tokens than this say nothing of a text.
FEWEST_TOKENS = 16


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


def token_rows(source: Path, scratch: Path, text: str, longest: int, most: int, trust_remote_code: bool = False) -> list[tuple[int, ...]]:
    """Return the text as consecutive rows of at most ``longest`` tokens, together about ``most``.

    Each row has the marks with which the tokenizer in ``source`` begins and ends a text. A tokenizer.json is made in ``scratch``
    where the model has none.

    Raises:
        UsageError: the model has no tokenizer that can be read, or the text has too few tokens.
    """
    from tokenizers import Tokenizer

    said = complete_tokenizer(source, scratch, trust_remote_code)
    path = next((folder / FILE for folder in (source, scratch) if (folder / FILE).is_file()), None)
    if path is None:
        raise UsageError("a text was given, and the model has no tokenizer", [said] if said else [], "leave the text out")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    begin, end = _marks(tokenizer)
    room = max(1, longest - len(begin) - len(end))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) < FEWEST_TOKENS:
        raise UsageError(f"the text has {len(ids)} tokens, which say nothing of a model", fix=f"name one of at least {FEWEST_TOKENS}")
    # One row at least; a last row of a token or two would count little and cost a whole call.
    rows = [ids[start : start + room] for start in range(0, max(min(len(ids), most), 1), room)]
    kept = [row for row in rows if len(row) >= min(FEWEST_TOKENS, room)]
    return [(*begin, *row, *end) for row in kept]


def _marks(tokenizer: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that the tokenizer puts before and after a text."""
    encode = tokenizer.encode  # type: ignore[attr-defined]  # tokenizers has no types
    plain, whole = encode("a", add_special_tokens=False).ids, encode("a").ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    return ((), ()) if at is None else (tuple(whole[:at]), tuple(whole[at + len(plain) :]))
