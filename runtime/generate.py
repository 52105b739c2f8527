"""Text continued greedily by an artifact: numpy, the artifact's runtime and its tokenizer, no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import NUM_LOGITS_TO_KEEP, Artifact
from calque.errors import ArtifactUnreadable, Unsupported, UsageError
from calque.runtime import load, open_session
from calque.runtime.chat import chat_prompt, read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.session import Session


def generate(folder: Path | str, prompt: str, max_new_tokens: int, chat: bool = False, threads: int = 0) -> dict[str, Any]:
    """Return the greedy continuation and its speed: ``text tokens prompt_tokens trained_length max_length ttft_ms tokens_per_s``.

    It ends at an end token, after ``max_new_tokens``, or at the artifact's ``max_length``. ``trained_length`` is how many
    tokens the model was trained for, None if its config does not say: past it a rotary model goes on, but not as well.
    ``ttft_ms`` is the time to the first token without opening the model; ``tokens_per_s`` is that of the tokens after it,
    None if there is none.

    Raises:
        UsageError: the prompt holds no token, or a chat template is asked for that is not there.
        Unsupported: the prompt alone is longer than ``max_length``, or the artifact has no dynamic cache.
        ArtifactUnreadable: not an artifact, or one without a tokenizer.
    """
    folder = Path(folder)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, at least 1 expected")
    artifact = load(folder)
    if not artifact.states:
        raise Unsupported(f"{folder} encodes text, it does not continue it", fix="run its graph, as docs/artifact.md shows")
    tokenizer = _tokenizer(folder)
    text = chat_prompt(folder, prompt) if chat else prompt
    # A chat template writes its special tokens itself.
    ids = list(tokenizer.encode(text, add_special_tokens=not chat).ids)
    if not ids:
        raise UsageError("the prompt holds no token", fix="give some text")
    check_vocabulary(artifact, ids)
    sequence = GreedySequence(artifact, open_session(folder, threads), [*ids])
    sequence.warm_up()
    ends, times = end_tokens(folder), [time.perf_counter()]
    for token in sequence.tokens(max_new_tokens):
        times.append(time.perf_counter())
        if token in ends:
            break
    new = sequence.ids[len(ids) :]
    steps = len(times) - 2
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": new,
        "prompt_tokens": len(ids),
        "trained_length": trained_length(folder),
        "max_length": artifact.limits.max_length,
        "ttft_ms": round((times[1] - times[0]) * 1000, 3) if new else None,
        "tokens_per_s": round(steps / (times[-1] - times[1]), 2) if steps > 0 else None,
    }


def check_vocabulary(artifact: Artifact, ids: list[int]) -> None:
    """Leave quietly if the model knows every token that its tokenizer made.

    Raises:
        Unsupported: the tokenizer has more tokens than the model.
    """
    [graph] = artifact.graphs.values()
    size = next((spec.shape[-1] for spec in graph.outputs if spec.name == "logits"), None)
    if isinstance(size, int) and max(ids) >= size:
        raise Unsupported(
            f"the tokenizer gives token {max(ids)}, the model has {size}", fix="tokenizer and model do not belong together"
        )  # fmt: skip


@dataclass
class GreedySequence:
    """One row of tokens and its cache; ``ids`` grows by one with each step."""

    artifact: Artifact
    session: Session
    ids: list[int]
    held: int = 0
    states: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.artifact.graphs) != 1:
            raise Unsupported(f"generation drives artifacts of one graph, this one has {sorted(self.artifact.graphs)}")
        if other := [spec.input for spec in self.artifact.states if spec.update == "in_place"]:
            raise Unsupported("generation needs states that grow or are replaced", other, "use the artifact's own runtime")
        [(self.graph, self.spec)] = self.artifact.graphs.items()

    def warm_up(self) -> None:
        """The graph is open: a first call of one token has been made and forgotten."""
        self._call(self.ids[:1])
        self.held = 0

    def tokens(self, count: int) -> Iterator[int]:
        """Yield up to ``count`` likeliest next tokens; stops where the artifact's ``max_length`` is reached."""
        limits = self.artifact.limits
        for _ in range(count):
            # The last token need not fit: it is never fed.
            if limits.max_length is not None and len(self.ids) > limits.max_length and self.held:
                return
            if limits.recompute_at is not None and 0 < self.held <= limits.recompute_at < len(self.ids):
                self.held = 0
            logits = self._call(self.ids[self.held :])
            self.held = len(self.ids)
            self.ids.append(int(logits[0, -1].argmax()))
            yield self.ids[-1]

    def _call(self, ids: list[int]) -> NDArray[np.generic]:
        if not self.held:
            self.states = {spec.input: self._empty(spec.shape, spec.dtype) for spec in self.artifact.states}
        total = self.held + len(ids)
        everything: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(self.held, total, dtype=np.int64)[None, :],
            NUM_LOGITS_TO_KEEP: np.array(1, dtype=np.int64),
        }
        names = {tensor.name for tensor in self.spec.inputs}
        outputs = self.session(self.graph, {**{name: array for name, array in everything.items() if name in names}, **self.states})
        self.states = {spec.input: outputs[spec.output] for spec in self.artifact.states}
        return outputs["logits"]

    @staticmethod
    def _empty(shape: tuple[int | str, ...], dtype: str) -> NDArray[np.generic]:
        dims = {"batch_size": 1, "past_sequence_length": 0}
        return np.zeros([dims[size] if isinstance(size, str) else size for size in shape], dtype=dtype)


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactUnreadable(f"{folder} has no tokenizer.json", fix="text needs one; the model can still be run on token ids")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ArtifactUnreadable(f"{path} cannot be read: {error}", fix="convert the model again") from error


def end_tokens(folder: Path) -> frozenset[int]:
    """Return the ids that end a text: those of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def trained_length(folder: Path) -> int | None:
    """Return how many tokens the model's config is made for, None where it does not say."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")  # where a model reads more than text
    length = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return length if isinstance(length, int) else None
