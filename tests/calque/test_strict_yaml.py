from __future__ import annotations

import math
from pathlib import Path

import pytest

from calque.errors import RecipeError
from calque.strict_yaml import parse_document, parse_value, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("1_000", "1_000"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("010", 10),
        ("-7", -7),
        ("0o17", 15),
        ("0xfF", 255),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("'4'", "4"),
        ("!!str 4", "4"),
        ("builtin:quill", "builtin:quill"),
        ("[1, a, {b: c}]", [1, "a", {"b": "c"}]),
        ("<<", "<<"),
    ],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_every_value_has_its_line() -> None:
    document = parse_document("a: 1\nb:\n  c:\n    - x\n    - y\n", "text")
    assert document.data == {"a": 1, "b": {"c": ["x", "y"]}}
    assert document.line(("a",)) == 1
    assert document.line(("b", "c")) == 3
    assert document.line(("b", "c", 1)) == 5
    assert document.line(("b", "c", 1, "unknown", "place")) == 5
    assert document.line(("nowhere",)) == 1


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: 2\na: 3", 3, "key `a` is given twice, first on line 1"),
        ("a:\n  b: 1\n  b: 2", 3, "key `b` is given twice, first on line 2"),
        ("a: &x 1\nb: *x", 1, "an alias"),
        ("a: [1\nb: 2", 2, "expected ',' or ']'"),
        ("a: 1\n\tb: 2", 2, "cannot start any token"),
        ("a: !!python/name:os.system x", 1, "a tag"),
        ("a: !mine x", 1, "a tag, !mine"),
        ("a: !!int x", 1, "'x' is not a int"),
        ("? [1, 2]\n: 3", 1, "a key that is not text"),
        ("a: 1\n---\nb: 2", 2, "another document"),
    ],
)
def test_silent_mistakes_are_refused_with_their_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_document(text, "the text")
    assert "the text" in caught.value.what
    assert len(caught.value.where) == 1
    assert f"line {line}: " in caught.value.where[0]
    assert problem in caught.value.where[0]


def test_all_problems_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_document("a: 1\na: 2\nb: !x 1\nb: 3", "the text")
    assert [line.split(":")[0] for line in caught.value.where] == ["line 2", "line 3", "line 4"]


def test_an_alias_cannot_grow_without_bound() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{name}: &{name} [*{before}, *{before}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(RecipeError, match="problems"):
        parse_document(bomb, "bomb")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse_document("[" * 5000, "deep")


def test_unreadable_files_are_recipe_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_document(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_document(tmp_path / "latin.yaml")
