"""Is the model still good? What another model says of rows of tokens, measured against what the original says of them.

The original runs first and what it says lies in mapped files; then whatever is to be judged runs, one row in memory at a time.
Of a generator every position after a row's first token counts: there the model knows nothing of the text yet. The figures say
how much worse a model is, not whether an artifact computes it rightly: that is `prove`, with limits a thousand times tighter.

Source: KL divergence of quantized models as in llama.cpp's perplexity tool; near ties as this gate's own `compare`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.errors import SourceUnreadable
from calque.validation.compare import RANKED
from calque.validation.drive import ModelIO, run
from calque.validation.scenarios import Scenario
from calque.validation.tolerance import tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.session import Session

    Floats = NDArray[np.floating[Any]]

Row = tuple[int, ...]
# The outputs of a model for one row alone, by name: [positions, size], the last positions where it gives no others, or [size].
Answer = Callable[[Row], Mapping[str, "NDArray[np.float32]"]]
# The logits that follow each token of a row from its ``prompt``-th on but the last, [len(row) - prompt, size].
Continue = Callable[[Row, int], "NDArray[np.float32]"]

# How a model may go on after rows of one length, by a guess: each row and so many tokens more, or each row as it is.
Draft = Callable[[Sequence[Row], int], Sequence[Row]]

# Positions computed in float64 at a time.
STEP = 64
# Greedy decoding: from so many rows' first tokens, so many tokens further.
PROMPTS, PROMPT, NEW_TOKENS = 4, 16, 32
# Above this the exponential of a loss is no float64; nobody asks how bad such a model is.
LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Quality:
    """How far a model is from the original on the same rows; what its kind of model has not is None.

    ``kl_mean``, ``kl_worst``: KL(original || model) in nats per position. ``top1_agree``: share of the positions with the same
    likeliest token, ``near_ties`` left out: those where the original itself hardly preferred one. ``perplexity``: of the model,
    ``original_perplexity``: of the original, on the tokens of a text. ``greedy_matched``: tokens of ``greedy_tokens`` before the
    first that greedy decoding chooses otherwise. ``cosine_mean``, ``cosine_worst``: of encoders, between outputs of a row.
    """

    positions: int
    kl_mean: float | None = None
    kl_worst: float | None = None
    top1_agree: float | None = None
    near_ties: int = 0
    perplexity: float | None = None
    original_perplexity: float | None = None
    greedy_matched: int | None = None
    greedy_tokens: int | None = None
    cosine_mean: float | None = None
    cosine_worst: float | None = None

    @property
    def perplexity_ratio(self) -> float | None:
        """The model's perplexity over the original's."""
        return self.perplexity / self.original_perplexity if self.perplexity and self.original_perplexity else None

    @property
    def loss(self) -> float:
        """What is smaller in a better model: the mean KL divergence, or what is missing from a cosine of 1."""
        return self.kl_mean if self.kl_mean is not None else 1.0 - (self.cosine_mean or 0.0)

    def data(self) -> dict[str, Any]:
        """Return what report.json holds."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


@dataclass(frozen=True)
class Baseline:
    """What the original says of each row, in files that must stay; and how it continues some of them.

    ``causal``: each position predicts the next token of the row. ``text``: the rows are one, so that perplexity means something.
    ``noise``: the difference of logits, in σ of a row's, that rounding of float32 alone may cause.
    """

    rows: tuple[Row, ...]
    files: tuple[Mapping[str, Path], ...]
    causal: bool
    text: bool
    noise: float
    continued: tuple[tuple[Row, int], ...] = ()

    @classmethod
    def keep(
        cls,
        original: Answer,
        rows: Sequence[Row],
        scratch: Path,
        *,
        causal: bool,
        text: bool,
        layers: int = 1,
        longest: int = 0,
        draft: Draft = lambda rows, count: rows,
    ) -> Baseline:
        """Return what ``original`` says of the rows, kept in ``scratch``.

        ``longest``: tokens of the longest row it takes, 0: no limit. ``draft``: guesses how it goes on, which saves time where it is right.
        """
        files = []
        for number, row in enumerate(rows):
            outputs = {name: array for name, array in original(row).items() if not causal or name == RANKED}
            _require_finite(outputs, row, "the original model")
            files.append({name: scratch / f"original-{number}-{name}.npy" for name in outputs})
            for name, array in outputs.items():
                np.save(files[-1][name], array)
        continued = _greedy(original, rows, longest, draft) if causal else ()
        return cls(tuple(rows), tuple(files), causal, text, tolerance("float32").noise(layers), continued)

    def compare(self, model: Answer, rows: int | None = None) -> Quality:
        """Return how far the model is from the original, on the first ``rows`` rows or on all; greedy decoding apart."""
        met = _Met(self)
        for row, files in zip(self.rows[:rows], self.files, strict=False):
            outputs = {name: array for name, array in model(row).items() if name in files}
            _require_finite(outputs, row, "the model that is judged")
            for name, array in outputs.items():
                expected = np.load(files[name], mmap_mode="r")
                if name == RANKED:
                    met.add_logits(row, np.atleast_2d(expected), np.atleast_2d(array))
                if not self.causal:
                    met.add_cosine(expected, array)
        return met.quality()

    def greedy(self, model: Continue) -> tuple[int, int] | tuple[None, None]:
        """Return how many tokens greedy decoding chooses as the original did before the first it does not, and of how many.

        Up to there a model's own continuation is the original's, so that one call over that says the same.
        """
        if not self.continued:
            return None, None
        matched = 0
        for row, prompt in self.continued:
            same = model(row, prompt).argmax(axis=1) == np.array(row[prompt:])
            matched += len(same) if same.all() else int(same.argmin())
        return matched, sum(len(row) - prompt for row, prompt in self.continued)


def continuing(answer: Answer) -> Continue:
    """Return the continuation of a model that gives logits at every position: one call a row."""
    return lambda row, prompt: answer(row)[RANKED][prompt - 1 : -1]


def _greedy(original: Answer, rows: Sequence[Row], longest: int, draft: Draft) -> tuple[tuple[Row, int], ...]:
    prompts = [row[:PROMPT] for row in rows[:PROMPTS]]
    goals = [min(len(prompt) + NEW_TOKENS, longest or sys.maxsize) for prompt in prompts]
    alike = len(set(map(len, prompts))) == 1
    guesses = draft(prompts, max(goals) - len(prompts[0])) if alike else prompts
    found = [_continued(original, *row) for row in zip(prompts, guesses, goals, strict=True)]
    return tuple((tokens, len(prompt)) for tokens, prompt in zip(found, prompts, strict=True) if len(tokens) > len(prompt))


def _continued(original: Answer, prompt: Row, guess: Row, goal: int) -> Row:
    """Return the prompt and the tokens that the original chooses one after the other; a guess saves calls as far as it is right."""
    tokens = prompt
    while len(tokens) < goal:
        ahead = guess[:goal] if guess[: len(tokens)] == tokens else tokens
        wanted = len(ahead) - len(tokens) + 1
        chosen = original(ahead)[RANKED][-wanted:].argmax(axis=-1).tolist()
        if len(chosen) < wanted:
            guess = ()  # it gives the last logits alone, which say nothing of those before
            continue
        right = next((i for i in range(wanted - 1) if ahead[len(tokens) + i] != chosen[i]), wanted - 1)
        tokens = (*tokens, *chosen[: right + 1])
    return tokens[:goal]


def _require_finite(outputs: Mapping[str, Floats], row: Row, whose: str) -> None:
    if wrong := [name for name, array in outputs.items() if not np.isfinite(array).all()]:
        raise SourceUnreadable(
            f"{', '.join(wrong)} of {whose} hold NaN or infinity on a row of {len(row)} tokens",
            fix="check the weights; the quality of such a model cannot be measured",
        )


class _Met:
    """The figures met so far."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline
        self.divergences: list[NDArray[np.float64]] = []
        self.losses: list[NDArray[np.float64]] = []
        self.cosines: list[float] = []
        self.agreed = self.near_ties = 0

    def add_logits(self, row: Row, expected: NDArray[np.float32], got: NDArray[np.float32]) -> None:
        """Count the positions that ``got`` has, the last of the row."""
        begin = len(expected) - len(got)
        first = max(begin, 1) if self.baseline.causal else begin
        sigma = float(np.std(expected)) or 1.0
        for start in range(first, len(expected), STEP):
            stop = min(start + STEP, len(expected))
            want, have = np.asarray(expected[start:stop]), got[start - begin : stop - begin]
            self._tokens(want, have, sigma)
            wanted, had = log_softmax(want), log_softmax(have)
            self.divergences.append(np.maximum((np.exp(wanted) * (wanted - had)).sum(axis=1), 0.0))
            if self.baseline.causal and self.baseline.text:
                following = np.array(row[start + 1 : stop + 1], dtype=np.int64)  # the last position of a row predicts nothing of it
                places = np.arange(len(following))
                self.losses.append(-np.stack([wanted[places, following], had[places, following]]))

    def _tokens(self, want: NDArray[np.float32], have: NDArray[np.float32], sigma: float) -> None:
        same = want.argmax(axis=1) == have.argmax(axis=1)
        leaders = np.partition(want, -2, axis=1)[:, -2:] if want.shape[1] > 1 else np.zeros((len(want), 2), np.float32)
        # Each of the two leading logits may have moved by the noise.
        tie = ~same & ((leaders[:, 1] - leaders[:, 0]) / sigma < 2 * self.baseline.noise)
        self.agreed += int(same.sum())
        self.near_ties += int(tie.sum())

    def add_cosine(self, expected: NDArray[np.float32], got: NDArray[np.float32]) -> None:
        """Count the cosine between two outputs of one row, whatever their axes."""
        one, other = (np.asarray(array, dtype=np.float64).ravel() for array in (expected, got))
        lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
        self.cosines.append(min(1.0, float(one @ other) / lengths) if lengths else float(np.array_equal(one, other)))

    def quality(self) -> Quality:
        """Return what was met, as one."""
        divergences = np.concatenate(self.divergences) if self.divergences else np.zeros(0)
        losses = np.concatenate(self.losses, axis=1) if self.losses else np.zeros((2, 0))
        count, counted = len(divergences), len(divergences) - self.near_ties
        original, model = (math.exp(min(float(loss.mean()), LARGEST_LOSS)) if len(loss) else None for loss in losses)
        return Quality(
            positions=count,
            kl_mean=float(divergences.mean()) if count else None,
            kl_worst=float(divergences.max()) if count else None,
            top1_agree=self.agreed / counted if counted else None,
            near_ties=self.near_ties,
            perplexity=model,
            original_perplexity=original,
            cosine_mean=float(np.mean(self.cosines)) if self.cosines else None,
            cosine_worst=min(self.cosines, default=None),
        )


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Return the logarithms of the probabilities, [positions, size], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def session_answer(session: Session, io: ModelIO, recompute_at: int | None = None) -> Answer:
    """Return what answers a row with the session's outputs; a graph that keeps the last logits alone gives those."""

    def answer(row: Row) -> dict[str, NDArray[np.float32]]:
        return _outputs(session, io, Scenario("quality", "one row, one call", (row,), (len(row),), recompute_at=recompute_at))

    return answer


def session_continue(session: Session, io: ModelIO, recompute_at: int | None = None) -> Continue:
    """Return what continues a row with the session: its prompt in one call, then one token a call over its cache."""

    def logits(row: Row, prompt: int) -> NDArray[np.float32]:
        fed, steps = row[:-1], len(row) - 1 - prompt
        scenario = Scenario("greedy", "a prompt and chained steps", (fed,), (prompt,), decode=steps, recompute_at=recompute_at)
        return _outputs(session, io, scenario)[RANKED][-steps - 1 :]

    return logits


def _outputs(session: Session, io: ModelIO, scenario: Scenario) -> dict[str, NDArray[np.float32]]:
    parts: dict[str, list[Floats]] = {}
    for reached in run(session, io, scenario):
        parts.setdefault(reached.output, []).append(np.asarray(reached.values, dtype=np.float32))
    return {name: np.concatenate(found) for name, found in parts.items()}
