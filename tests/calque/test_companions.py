from __future__ import annotations

from pathlib import Path

import pytest

from calque.companions import companion_files, licence_note


@pytest.mark.parametrize("name", ["LICENSE", "license.md", "License.TXT", "LICENCE", "COPYING", "notice", "NOTICE.txt", "Use_Policy.md"])
def test_licence_files_are_companions_in_any_case(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("terms")
    (tmp_path / "README.md").write_text("card")
    assert [path.name for path in companion_files(tmp_path)] == [name]


def test_what_prepares_images_is_a_companion(tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json", "optimizer.json"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in companion_files(tmp_path)] == ["preprocessor_config.json", "processor_config.json"]


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: apache-2.0", "the licence apache-2.0;"),
        ("tags:\n- x\nlicense: [mit, apache-2.0]", "the licence mit, apache-2.0;"),
        ("license: other\nlicense_name: own-terms\nlicense_link: https://example.org/terms", "own-terms (https://example.org/terms);"),
        ("license: other", "the licence other;"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_licence_of_the_card_is_told_where_no_file_has_it(tmp_path: Path, front: str, said: str, newline: str) -> None:
    (tmp_path / "NOTICE").write_text("a notice is no licence")
    (tmp_path / "README.md").write_bytes(f"---\n{front}\n---\n# Name\nlicense: not-this\n".replace("\n", newline).encode())
    assert said in licence_note(tmp_path)


def test_card_is_not_asked_where_a_licence_file_came(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "license.txt").write_text("terms")
    assert licence_note(tmp_path) == ""


@pytest.mark.parametrize(
    "card",
    [b"", b"# license: mit\n", b"---\nlicense: mit\n", b"---\n: [\n---\n", b"---\n- license\n---\n", b"---\nlicense:\n---\n", b"\xff\xfe"],
)
def test_card_that_states_no_licence_says_nothing(tmp_path: Path, card: bytes) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert licence_note(tmp_path) == ""


def test_model_without_a_card_says_nothing(tmp_path: Path) -> None:
    assert licence_note(tmp_path) == ""
