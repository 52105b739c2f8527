from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from calque.tokenizer import complete_tokenizer
from tests.tiny_checkpoints import HELD_OUT, llama_config, write_sentencepiece

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A llama whose only tokenizer is a sentencepiece model, and a folder ``out`` beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    llama_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def state_class(model: Path, name: str) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))


@pytest.mark.parametrize("stated", [True, False])
def test_sentencepiece_becomes_a_tokenizer_that_splits_text_alike(model: Path, tmp_path: Path, stated: bool) -> None:
    write_sentencepiece(model / "tokenizer.model")
    if stated:
        state_class(model, "LlamaTokenizer")
    note = complete_tokenizer(model, tmp_path / "out", trust_remote_code=False)
    assert note.startswith("tokenizer.json was made of tokenizer.model by transformers.")
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    original = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    lines = [line.strip() for line in HELD_OUT.read_text().splitlines() if line.strip()][:200]
    assert len(lines) == 200
    assert [made.encode(line, add_special_tokens=False).ids for line in lines] == original.encode(lines)
    assert made.decode(made.encode(lines[0]).ids, skip_special_tokens=True) == lines[0]


def test_tokenizer_that_splits_text_otherwise_is_told(model: Path, tmp_path: Path) -> None:
    # Llama's class puts a blank before each text, which this model was not trained with.
    write_sentencepiece(model / "tokenizer.model", add_dummy_prefix=False)
    state_class(model, "LlamaTokenizer")
    assert "otherwise than tokenizer.model itself" in complete_tokenizer(model, tmp_path / "out", trust_remote_code=False)


def test_tokenizer_that_splits_text_alike_is_told_without_a_warning(model: Path, tmp_path: Path) -> None:
    write_sentencepiece(model / "tokenizer.model", add_dummy_prefix=False)
    note = complete_tokenizer(model, tmp_path / "out", trust_remote_code=False)
    assert note == "tokenizer.json was made of tokenizer.model by transformers."


def test_two_conversions_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    write_sentencepiece(model / "tokenizer.model")
    made: list[bytes] = []
    for _ in range(2):
        complete_tokenizer(model, tmp_path / "out", trust_remote_code=False)
        made.append((tmp_path / "out" / "tokenizer.json").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("files", [{"tokenizer.json": "own"}, {}, {"vocab.png": ""}])
def test_nothing_is_made_where_there_is_a_tokenizer_already_or_none(model: Path, tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (model / name).write_text(text)
    assert complete_tokenizer(model, tmp_path / "out", trust_remote_code=False) == ""
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\x00not sentencepiece", b"%%% ???"])
def test_tokenizer_that_cannot_be_converted_is_told(model: Path, tmp_path: Path, content: bytes) -> None:
    (model / "tokenizer.model").write_bytes(content)
    note = complete_tokenizer(model, tmp_path / "out", trust_remote_code=False)
    assert note.startswith("No tokenizer.json could be made of tokenizer.model: ")
    assert "runs on token ids" in note
    assert list((tmp_path / "out").iterdir()) == []


def test_own_code_of_a_tokenizer_does_not_run_unasked(model: Path, tmp_path: Path) -> None:
    write_sentencepiece(model / "tokenizer.model")
    (model / "own.py").write_text(f"from pathlib import Path\nPath(r'{tmp_path / 'ran'}').touch()\nclass OwnTokenizer: pass\n")
    settings: dict[str, Any] = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    complete_tokenizer(model, tmp_path / "out", trust_remote_code=False)
    assert not (tmp_path / "ran").exists()


WITHOUT = """
import sys
from pathlib import Path
sys.modules["sentencepiece"] = None
from calque.tokenizer import complete_tokenizer
print(complete_tokenizer(Path(sys.argv[1]), Path(sys.argv[2]), False))
"""


def test_missing_package_is_named_with_the_command_that_installs_it(model: Path, tmp_path: Path) -> None:
    write_sentencepiece(model / "tokenizer.model")
    command = [sys.executable, "-c", WITHOUT, str(model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "No tokenizer.json could be made" in done.stdout
    assert "pip install sentencepiece" in done.stdout
