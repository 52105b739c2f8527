"""Artifacts, as they are, in optimum-onnx: `python -m pytest -m ecosystem tests/ecosystem/test_optimum.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calque.pipeline import convert
from calque.recipe import Recipe
from calque.runtime import open_session
from calque.runtime.generate import generate
from tests.ecosystem import peers
from tests.ecosystem.decoders import NEW, PADDING, PROMPTS, converted, own_tokens, save_decoder, until_end
from tests.tiny_encoders import save_encoder

pytestmark = pytest.mark.ecosystem

GENERATE = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
asked = json.loads(sys.argv[1])
model = ORTModelForCausalLM.from_pretrained(asked["folder"])

def grow(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[asked["padding"]] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": asked["new"], "do_sample": False, "pad_token_id": asked["padding"]}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].tolist()

print(json.dumps({"alone": [grow([row])[0] for row in asked["rows"]], "batch": grow(asked["rows"])}))
"""

PIPELINE = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, pipeline
asked = json.loads(sys.argv[1])
model, tokenizer = ORTModelForCausalLM.from_pretrained(asked["folder"]), AutoTokenizer.from_pretrained(asked["folder"])
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
[answer] = write(asked["text"], max_new_tokens=asked["new"], do_sample=False, return_full_text=False)
print(json.dumps(answer["generated_text"]))
"""

ENCODE = """
import json, sys
import optimum.onnxruntime, torch
asked = json.loads(sys.argv[1])
model = getattr(optimum.onnxruntime, asked["class"]).from_pretrained(asked["folder"])
feed = {name: torch.tensor(rows) for name, rows in asked["feed"].items()}
print(json.dumps({name: value.tolist() for name, value in model(**feed).items()}))
"""

TASKS = {
    "feature-extraction": ("ORTModelForFeatureExtraction", "BertModel"),
    "text-classification": ("ORTModelForSequenceClassification", "BertForSequenceClassification"),
    "token-classification": ("ORTModelForTokenClassification", "BertForTokenClassification"),
    "question-answering": ("ORTModelForQuestionAnswering", "BertForQuestionAnswering"),
    "fill-mask": ("ORTModelForMaskedLM", "BertForMaskedLM"),
}


@pytest.fixture(scope="module")
def optimum() -> Path:
    return peers.environment("optimum-onnx", peers.OPTIMUM, beside_ours=True)


def ask(optimum: Path, program: str, folder: Path, cwd: Path, **more: Any) -> Any:
    return peers.python(optimum, program, {"folder": str(folder), "new": NEW, "padding": PADDING, **more}, cwd)


# What optimum-onnx 0.1 takes for the size and number of the cache's heads: hidden / heads and all heads but for the types it lists.
SQUARE = {"head_dim": 16}
ALL_HEADS = {**SQUARE, "kv_heads": 4}
WRONG_CACHE = pytest.mark.xfail(strict=True, reason="optimum-onnx 0.1: Got invalid dimensions for input: past_key_values.1.key")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, SQUARE) for name in ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3")),
        *((name, {}) for name in ("gemma", "gemma3_text", "gpt_oss", "nemotron")),
        *((name, ALL_HEADS) for name in ("gemma2", "phi3", "olmo", "phi")),
        pytest.param("qwen3", {}, marks=WRONG_CACHE),
        pytest.param("gemma2", {}, marks=WRONG_CACHE),
    ],
)
def test_optimum_generates_the_tokens_of_calque_alone_and_padded_on_the_left(
    name: str, shape: dict[str, int], optimum: Path, tmp_path: Path
) -> None:
    folder = converted(str(save_decoder(name, tmp_path / "model", **shape)), tmp_path / "out").folder
    expected = until_end(own_tokens(folder, PROMPTS))
    found = ask(optimum, GENERATE, folder, tmp_path, rows=PROMPTS)
    assert until_end(found["alone"]) == until_end(found["batch"]) == expected
    assert len({token for row in expected for token in row}) > 3, "a model that repeats one token would show nothing"


@pytest.mark.parametrize("layout", ["flat", "transformers.js"])
def test_pipeline_writes_the_text_of_calque(layout: str, optimum: Path, tmp_path: Path) -> None:
    folder = converted("builtin:quill", tmp_path / "out", layout=layout).folder
    own = generate(folder, "The function returns", NEW)
    assert ask(optimum, PIPELINE, folder, tmp_path, text="The function returns") == own["text"]


@pytest.mark.parametrize("task", TASKS)
def test_encoder_gives_what_the_session_of_calque_gives(task: str, optimum: Path, tmp_path: Path) -> None:
    taken, architecture = TASKS[task]
    model = save_encoder(tmp_path / "model", "bert", task, architectures=[architecture])
    folder = convert(Recipe(model=str(model), target="onnxruntime"), tmp_path / "out").folder
    feed = {
        "input_ids": [[1, 7, 30, 5, 2], [1, 44, 2, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "token_type_ids": [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]],
    }
    own = open_session(folder)("model", {name: np.array(rows, np.int64) for name, rows in feed.items()})
    found = ask(optimum, ENCODE, folder, tmp_path, feed=feed, **{"class": taken})
    assert set(found) <= set(own)
    assert found
    for name, values in found.items():
        assert np.shape(values) == own[name].shape
        assert np.abs(np.array(values, np.float32) - own[name].astype(np.float32)).max() < 1e-5
