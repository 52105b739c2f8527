"""Artifacts, as they are, in onnxruntime-genai: `python -m pytest -m ecosystem tests/ecosystem/test_genai.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calque.runtime.generate import generate
from calque.targets._genai import TYPES as KNOWN
from tests.ecosystem import peers
from tests.ecosystem.decoders import DECODERS, NEW, PADDING, PROMPTS, converted, own_tokens, save_decoder, until_end

pytestmark = pytest.mark.ecosystem

GENERATE = """
import json, sys
import numpy as np, onnxruntime_genai as og
asked = json.loads(sys.argv[1])
model = og.Model(asked["folder"])

def grow(rows):
    longest = max(map(len, rows))
    options = og.GeneratorParams(model)
    options.set_search_options(batch_size=len(rows), do_sample=False, max_length=longest + asked["new"])
    generator = og.Generator(model, options)
    generator.append_tokens(np.array([row + [asked["padding"]] * (longest - len(row)) for row in rows], np.int32))
    for _ in range(asked["new"]):
        if generator.is_done():
            break
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[longest:]] for row in range(len(rows))]

answer = {"version": og.__version__, "type": model.type, "alone": [grow([row])[0] for row in asked["rows"]], "batch": grow(asked["rows"])}
if asked.get("text"):
    answer["ids"] = [int(token) for token in og.Tokenizer(model).encode(asked["text"])]
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def genai() -> Path:
    return peers.environment("genai", peers.GENAI)


def ask(genai: Path, folder: Path, rows: list[list[int]], cwd: Path, **more: Any) -> Any:
    return peers.python(genai, GENERATE, {"folder": str(folder), "rows": rows, "new": NEW, "padding": PADDING, **more}, cwd)


@pytest.mark.parametrize("name", DECODERS)
def test_genai_generates_the_tokens_of_calque_alone_and_padded_on_the_right(name: str, genai: Path, tmp_path: Path) -> None:
    folder = converted(str(save_decoder(name, tmp_path / "model")), tmp_path / "out").folder
    expected = until_end(own_tokens(folder, PROMPTS))
    found = ask(genai, folder, PROMPTS, tmp_path)
    assert found["version"].startswith("0.18.")
    assert found["type"] == KNOWN[DECODERS[name].model_type]
    assert until_end(found["alone"]) == until_end(found["batch"]) == expected
    assert len({token for row in expected for token in row}) > 3, "a model that repeats one token would show nothing"


def test_every_type_that_gets_a_genai_config_is_tried() -> None:
    assert {tiny.model_type for tiny in DECODERS.values()} == set(KNOWN)


@pytest.mark.parametrize("layout", ["flat", "transformers.js"])
def test_quill_generates_the_same_text_from_either_layout(layout: str, genai: Path, tmp_path: Path) -> None:
    folder = converted("builtin:quill", tmp_path / "out", layout=layout).folder
    own = generate(folder, "The function returns", NEW)
    prompts = [[1, 529, 476, 1198], [1, 1926], [1, 529, 476, 1198, 266, 628]]
    found = ask(genai, folder, prompts, tmp_path, text="The function returns")
    assert found["ids"] == prompts[0][1:]  # genai adds the begin token only where tokenizer_config.json has add_bos_token
    assert found["alone"][0] == own["tokens"]
    assert found["alone"] == found["batch"] == own_tokens(folder, prompts)
