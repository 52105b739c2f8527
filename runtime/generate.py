"""Text continued greedily by an artifact: numpy, the artifact's runtime and its tokenizer, no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.artifact import Artifact, read_json
from calque.errors import ArtifactUnreadable, Unsupported, UsageError
from calque.runtime import load, open_session
from calque.runtime.chat import chat_prompt
from calque.runtime.decoder import Decoder

if TYPE_CHECKING:
    from calque.session import Session

MOST_RESERVED = 1024


def generate(
    folder: Path | str, prompt: str, max_new_tokens: int, chat: bool = False, threads: int = 0, tell: Callable[[str], object] | None = None
) -> dict[str, Any]:
    """Return the greedy continuation and its speed: ``text tokens prompt_tokens trained_length max_length ttft_ms tokens_per_s``.

    It ends at an end token, after ``max_new_tokens``, or at the artifact's ``max_length``. ``trained_length`` is how many
    tokens the model was trained for, None if its config does not say: past it a rotary model goes on, but not as well.
    ``ttft_ms`` is the time to the first token without opening the model; ``tokens_per_s`` is that of the tokens after it,
    None if there is none. ``tell`` is given the text so far after each token.

    Raises:
        UsageError: the prompt holds no token, or a chat template is asked for that is not there.
        Unsupported: the prompt alone is longer than ``max_length``, or the artifact is no generator.
        ArtifactUnreadable: not an artifact, or one without a tokenizer.
    """
    folder = Path(folder)
    _require_sense(prompt, max_new_tokens)
    artifact = load(folder)
    sequence = GreedySequence(artifact, open_session(folder, threads), [])
    tokenizer = _tokenizer(folder)
    text = chat_prompt(folder, prompt) if chat else prompt
    # A chat template writes its special tokens itself.
    ids = list(tokenizer.encode(text, add_special_tokens=not chat).ids)
    if not ids:
        raise UsageError("the prompt holds no token", fix="give some text")
    check_vocabulary(artifact, ids)
    sequence.restart([*ids])
    sequence.warm_up()
    new: list[int] = []
    seconds: list[float] = []  # of each step alone: what is told of it meanwhile takes time too
    ends, steps = end_tokens(folder), sequence.tokens(max_new_tokens)
    start = time.perf_counter()
    for token in steps:
        seconds.append(time.perf_counter() - start)
        new.append(token)
        if tell is not None:
            tell(tokenizer.decode(new, skip_special_tokens=True))
        if token in ends:
            break
        start = time.perf_counter()
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": new,
        "prompt_tokens": len(ids),
        "trained_length": trained_length(folder),
        "max_length": artifact.limits.max_length,
        "ttft_ms": round(seconds[0] * 1000, 3) if new else None,
        "tokens_per_s": round((len(new) - 1) / sum(seconds[1:]), 2) if len(new) > 1 else None,
    }


def _require_sense(prompt: str, max_new_tokens: int) -> None:
    """Leave quietly if something is asked for, and of a prompt of which no byte was left undecoded."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, at least 1 expected")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError("the prompt is no text: it holds bytes that are not UTF-8", fix="give text in UTF-8")


def check_vocabulary(artifact: Artifact, ids: list[int]) -> None:
    """Leave quietly if the model knows every token that its tokenizer made.

    Raises:
        Unsupported: the tokenizer has more tokens than the model.
    """
    graph = next(iter(artifact.graphs.values()))
    size = next((spec.shape[-1] for spec in graph.outputs if spec.name == "logits"), None)
    if isinstance(size, int) and max(ids) >= size:
        raise Unsupported(
            f"the tokenizer gives token {max(ids)}, the model has {size}", fix="tokenizer and model do not belong together"
        )  # fmt: skip


class GreedySequence:
    """One row of tokens, or ``rows`` that are the same, continued by the likeliest next one; ``ids`` grows by one with each step."""

    def __init__(self, artifact: Artifact, session: Session, ids: list[int], rows: int = 1) -> None:
        self.ids = ids
        self._limits, self._rows = artifact.limits, rows
        self._decoder = Decoder(artifact, session, rows)

    def warm_up(self) -> None:
        """The graph is open: a first call of one token has been made and forgotten."""
        self._decoder(np.array([self.ids[:1]] * self._rows, np.int64))
        self.restart(self.ids)

    def restart(self, ids: list[int]) -> None:
        """The row is ``ids``, and nothing of them has been fed."""
        self.ids = ids
        self._decoder.reset()

    def tokens(self, count: int) -> Iterator[int]:
        """Yield up to ``count`` likeliest next tokens; stops where the artifact's ``max_length`` is reached."""
        longest, recompute_at = self._limits.max_length, self._limits.recompute_at
        # Room is memory once it is used; beyond this, buffers grow.
        self._decoder.reserve(len(self.ids) + min(count, MOST_RESERVED))
        for _ in range(count):
            held = int(self._decoder.lengths[0])
            # The last token need not fit: it is never fed.
            if longest is not None and len(self.ids) > longest and held:
                return
            if recompute_at is not None and 0 < held <= recompute_at < len(self.ids):
                self._decoder.reset()
                held = 0
            logits = self._decoder(np.array([self.ids[held:]] * self._rows, np.int64))
            self.ids.append(int(logits[0, -1].argmax()))
            yield self.ids[-1]


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
