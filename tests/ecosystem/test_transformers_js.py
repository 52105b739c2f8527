"""Artifacts with `--layout transformers.js` in the real one, under Node.

`python -m pytest -m ecosystem tests/ecosystem/test_transformers_js.py`.
"""

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
from tests.ecosystem.decoders import NEW, PROMPTS, converted, own_tokens, save_decoder, until_end
from tests.tiny_encoders import save_encoder

pytestmark = pytest.mark.ecosystem

HEAD = """
import * as hf from "@huggingface/transformers";
const asked = JSON.parse(process.argv[1]);
hf.env.allowRemoteModels = false;
hf.env.localModelPath = asked.parent;
const whole = (rows) => new hf.Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
const told = (value) => console.log(JSON.stringify(value, (_, inner) => typeof inner === "bigint" ? Number(inner) : inner));
"""

GENERATE = """
const model = await hf.AutoModelForCausalLM.from_pretrained(asked.name);
const grow = async (rows) => {
  const longest = Math.max(...rows.map((row) => row.length));
  const fill = (row, value) => [...Array(longest - row.length).fill(value)];
  const feed = {
    input_ids: whole(rows.map((row) => [...fill(row, 0), ...row])),
    attention_mask: whole(rows.map((row) => [...fill(row, 0), ...row.map(() => 1)])),
  };
  const grown = await model.generate({ ...feed, max_new_tokens: asked.new, do_sample: false });
  return grown.tolist().map((row) => row.slice(longest));
};
const alone = [];
for (const row of asked.rows) alone.push((await grow([row]))[0]);
told({ version: hf.env.version, alone, batch: await grow(asked.rows) });
"""

WRITE = """
const tokenizer = await hf.AutoTokenizer.from_pretrained(asked.name);
const model = await hf.AutoModelForCausalLM.from_pretrained(asked.name);
const feed = tokenizer(asked.text);
const grown = await model.generate({ ...feed, max_new_tokens: asked.new, do_sample: false });
told(tokenizer.decode(grown.tolist()[0].slice(feed.input_ids.dims[1]), { skip_special_tokens: true }));
"""

ENCODE = """
const model = await hf.AutoModel.from_pretrained(asked.name);
const feed = Object.fromEntries(Object.entries(asked.feed).map(([name, rows]) => [name, whole(rows)]));
told((await model(feed)).last_hidden_state.tolist());
"""


@pytest.fixture(scope="module")
def modules() -> Path:
    found = peers.node_modules()
    if found is None:
        pytest.skip("node and npm are not installed")
    return found


def ask(modules: Path, program: str, folder: Path, **more: Any) -> Any:
    return peers.node(modules, HEAD + program, {"parent": f"{folder.parent}/", "name": folder.name, "new": NEW, **more})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_transformers_js_generates_the_tokens_of_calque_alone_and_padded_on_the_left(name: str, modules: Path, tmp_path: Path) -> None:
    folder = converted(str(save_decoder(name, tmp_path / "model")), tmp_path / "out", layout="transformers.js").folder
    expected = until_end(own_tokens(folder, PROMPTS))
    found = ask(modules, GENERATE, folder, rows=PROMPTS)
    assert found["version"] == "4.3.1"
    assert until_end(found["alone"]) == until_end(found["batch"]) == expected


def test_transformers_js_writes_the_text_of_calque(modules: Path, tmp_path: Path) -> None:
    folder = converted("builtin:quill", tmp_path / "out", layout="transformers.js").folder
    assert ask(modules, WRITE, folder, text="The function returns") == generate(folder, "The function returns", NEW)["text"]


def test_encoder_gives_what_the_session_of_calque_gives(modules: Path, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert", architectures=["BertModel"])
    folder = convert(Recipe(model=str(model), target="onnxruntime", layout="transformers.js"), tmp_path / "out").folder
    feed = {
        "input_ids": [[1, 7, 30, 5, 2], [1, 44, 2, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "token_type_ids": [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]],
    }
    own = open_session(folder)("model", {name: np.array(rows, np.int64) for name, rows in feed.items()})["last_hidden_state"]
    found = np.array(ask(modules, ENCODE, folder, feed=feed), np.float32)
    assert found.shape == own.shape
    assert np.abs(found - own.astype(np.float32)).max() < 1e-5
