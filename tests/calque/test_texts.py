from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from calque.errors import UsageError
from calque.source import BUILTIN_FOLDER
from calque.texts import FEWEST_TOKENS, read_text, token_rows

WORDS = [f"w{number}" for number in range(40)]
TEXT = " ".join(WORDS)


def tokenizer(folder: Path, template: str = "[CLS] $A [SEP]") -> Path:
    vocabulary = {word: number for number, word in enumerate(["[CLS]", "[SEP]", "a", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    made.enable_truncation(4)
    made.enable_padding(length=64)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_rows_follow_each_other_and_have_the_marks_of_the_tokenizer(tmp_path: Path) -> None:
    rows = token_rows(tokenizer(tmp_path), TEXT, longest=20, most=1000)
    assert [(row[0], row[-1]) for row in rows] == [(0, 1)] * 2
    assert [token for row in rows for token in row[1:-1]] == [*range(3, 39)]  # the rest would be a row of four
    assert max(map(len, rows)) == 20


def test_no_more_rows_are_made_than_hold_most_tokens(tmp_path: Path) -> None:
    assert len(token_rows(tokenizer(tmp_path), TEXT, longest=20, most=18)) == 1
    assert len(token_rows(tokenizer(tmp_path), TEXT, longest=20, most=1)) == 1


def test_a_tokenizer_without_marks_adds_none(tmp_path: Path) -> None:
    [row] = token_rows(tokenizer(tmp_path, "$A"), TEXT, longest=64, most=1000)
    assert row == tuple(range(3, 43))


def test_the_builtin_model_begins_each_row_with_its_mark() -> None:
    folder = BUILTIN_FOLDER / "quill"
    rows = token_rows(folder, read_text(folder / "heldout.txt"), longest=1024, most=10_000)
    assert len(rows) == 10
    assert {row[0] for row in rows} == {1}
    assert {len(row) for row in rows} == {1024}


def test_a_text_of_a_few_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{FEWEST_TOKENS - 1} tokens"):
        token_rows(tokenizer(tmp_path), " ".join(WORDS[: FEWEST_TOKENS - 1]), longest=20, most=100)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no text"):
        read_text(tmp_path / "binary")
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path)
