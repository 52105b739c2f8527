"""The programs in docs/artifact.md, run as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from calque.artifact import Artifact
from calque.pipeline import convert
from calque.recipe import Parity, Recipe
from calque.runtime import OnnxRuntimeSession
from calque.runtime.generate import GreedySequence
from tests.tiny_encoders import VOCABULARY, save_encoder, save_pooling
from tests.tiny_models import TINY, save_random

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here

PAGE = Path(__file__).parents[2] / "docs" / "artifact.md"
RUNTIME, GENERATOR, STATIC, ENCODER = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def converted(model: Path, out: Path, **options: Any) -> Artifact:
    return convert(Recipe(model=str(model), target="onnxruntime", options=options, parity=Parity(scenarios=("single-prompt",))), out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both artifacts under the names that the page gives them; the sentence encoder does not normalize."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "llama").mkdir()
    save_random(TINY["llama"], folder / "llama")
    converted(folder / "llama", folder / "quill")
    converted(folder / "llama", folder / "static", cache="static")
    model = save_pooling(save_encoder(folder / "bert", "bert"), "Pooling", pooling_mode="mean")
    words = ["[PAD]", "[UNK]", *"a cat sat on the mat it rains".split()]  # noqa: SIM905
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(4)  # as released tokenizers do, shorter than the model could
    tokenizer.save(str(model / "tokenizer.json"))
    assert len(words) < VOCABULARY
    converted(model, folder / "minilm")
    return folder


def run(program: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    return names


def test_the_program_that_decodes_gives_the_tokens_of_each_row_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = RUNTIME.replace("last = decoder(", "chosen = last.argmax(-1); rows.append(chosen); last = decoder(")
    found = run(f"rows = []\n{program}", place, monkeypatch)
    artifact = Artifact.read(place / "quill")
    for row, prompt in enumerate(([5, 9, 17], [8, 3])):
        alone = GreedySequence(artifact, OnnxRuntimeSession(artifact), [*prompt])
        assert [*alone.tokens(20)] == [int(chosen[row]) for chosen in found["rows"]]


def test_the_program_of_a_generator_gives_logits_and_states(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run(GENERATOR, place, monkeypatch)["outputs"]
    assert outputs["logits"].shape[:2] == (2, 3)
    assert outputs["present.0.key"].shape[2] == 3


def test_the_program_of_a_static_cache_writes_its_slots_in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(STATIC, place, monkeypatch)
    assert found["logits"].shape[:2] == (2, 3)
    keys = found["kept"]["past_key_values.0.key"].numpy()
    assert [bool(keys[:, :, slot].any()) for slot in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("text", ["it rains", "it rains " * 300], ids=["short", "longer than the model"])
def test_the_program_of_an_encoder_gives_unit_vectors_of_whole_texts(text: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = Artifact.read(place / "minilm").limits.max_length
    assert longest == 64
    found = run(ENCODER.replace('"it rains"', repr(text)), place, monkeypatch)
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, rtol=1e-6)
    assert found["feed"]["input_ids"].shape == (2, min(longest, max(6, len(text.split()))))
