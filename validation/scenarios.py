"""What an artifact is asked before it is trusted: rows of tokens, how they are padded, cut and continued; or images.

Row ``r`` of every scenario is a prefix of one seeded pool sequence ``r``, so the eager reference of all scenarios costs
one forward a pool sequence, not one a scenario. An image is a row of one token, which is its number: see `images.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from calque.suggest import nearest
from calque.validation.images import PLAIN, RANDOM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.artifact import Limits

Side = Literal["left", "right", "none"]

PAD = -1
POOL = 5
# The longest row worth its time by default: eager attention holds heads · length² scores of one layer at once.
LONGEST = 8192
# Longer limits are not driven to their end: the row would cost more than it could show.
SMALL_MAX_LENGTH = 2048
FEW_POSITIONS = 128
# A cache of fewer slots has no room for a short row beside a full one.
FEWEST_SLOTS = 8
# What the logits of one call may take where a scenario is free to cut the prompt.
LOGITS_BYTES = 256 << 20


# Every name that `build` can give; a number is a window, or a length at which the rotary frequencies change.
NAMES = re.compile(
    r"single-image|batch-5-turned|plain-images|single-prompt|decode-16|ragged-(left|right)|chunked-prefill(-batch|-left)?|batch-[25]"
    r"|untraced-length|length-1(-left|-right)?"
    r"|past-window-\d+(-left|-right)?|across-window-\d+|beyond-\d+|across-\d+(-left|-right)?|continued-past-\d+|(past-)?full-length|full-length-right"
)


@dataclass(frozen=True)
class Scenario:
    """One conversation with the model: each row's prompt in one or more calls, then chained one-token steps.

    ``rows`` holds each row's prompt and continuation; ``chunks`` cuts the padded prompt into calls, empty meaning one
    call; ``decode`` steps are teacher-forced with the row's own next tokens. ``refuse`` names the limit that forbids
    the scenario: the session must raise ``Unsupported``. ``not_run`` says why the scenario is left out.
    """

    name: str
    why: str
    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...]
    padding: Side = "none"
    chunks: tuple[int, ...] = ()
    decode: int = 0
    recompute_at: int | None = None
    refuse: str = ""
    not_run: str = ""

    def __post_init__(self) -> None:
        if not self.not_run and [len(row) for row in self.rows] != [prompt + self.decode for prompt in self.prompts]:
            raise ValueError(f"scenario {self.name}: a row is its prompt and {self.decode} more tokens")
        if self.chunks and sum(self.chunks) != max(self.prompts):
            raise ValueError(f"scenario {self.name}: chunks cover {sum(self.chunks)} of {max(self.prompts)} columns")
        if self.padding == "none" and len(set(self.prompts)) > 1:
            raise ValueError(f"scenario {self.name}: a ragged batch needs a padding side")


@dataclass(frozen=True)
class Call:
    """One call: which position of its row each new column holds, PAD where none, int64 [B, S].

    ``fresh``: the cache is empty before it. ``beyond``: per row, whether its length after the call is past
    ``recompute_at``, where the model is another function of the same tokens.
    """

    index: NDArray[np.int64]
    fresh: bool
    beyond: tuple[bool, ...]

    @property
    def width(self) -> int:
        """The number of new columns, S."""
        return int(self.index.shape[1])


def calls(scenario: Scenario) -> Iterator[Call]:
    """Yield the calls in order, with the cache dropped and the rows fed whole where it may not be continued."""
    held = np.zeros(len(scenario.prompts), dtype=np.int64)
    limit = scenario.recompute_at
    for number, index in enumerate(_columns(scenario)):
        reached = held + (index != PAD).sum(axis=1)
        crosses = limit is not None and bool(((held > 0) & (held <= limit) & (reached > limit)).any())
        beyond = tuple(limit is not None and int(length) > limit for length in reached)
        yield Call(pad(reached, scenario.padding) if crosses else index, crosses or number == 0, beyond)
        held = reached


def _columns(scenario: Scenario) -> Iterator[NDArray[np.int64]]:
    prompts = np.asarray(scenario.prompts, dtype=np.int64)
    whole = pad(prompts, scenario.padding)
    start = 0
    for size in scenario.chunks or (whole.shape[1],):
        yield whole[:, start : start + size]
        start += size
    for step in range(scenario.decode):
        yield (prompts + step)[:, None]


def pad(lengths: NDArray[np.int64], side: Side) -> NDArray[np.int64]:
    """Return the positions 0 … length-1 of each row laid out in one rectangle, PAD elsewhere: int64 [B, longest]."""
    width = int(lengths.max())
    columns = np.arange(width, dtype=np.int64)[None, :]
    positions = columns - (width - lengths[:, None]) if side == "left" else np.broadcast_to(columns, (len(lengths), width))
    return np.where((positions >= 0) & (positions < lengths[:, None]), positions, PAD)


@dataclass(frozen=True)
class _Shape:
    """A scenario before it has tokens."""

    name: str
    why: str
    prompts: tuple[int, ...]
    padding: Side = "none"
    chunks: tuple[int, ...] = ()
    decode: int = 0
    # False: the driver must continue a cache that may not be continued, or go past the end, and be refused.
    lawful: bool = True
    refuse: str = ""

    @property
    def longest(self) -> int:
        return max(self.prompts) + self.decode


def build(
    limits: Limits,
    vocab_size: int,
    *,
    excluded: Iterable[int] = (),
    windows: Iterable[int] = (),
    max_positions: int | None = None,
    cached: bool = True,
    longest: int = LONGEST,
    in_slots: bool = False,
    seed: int = 0,
) -> list[Scenario]:
    """Return every scenario the limits allow, and refusals for those they forbid; the same list for equal arguments.

    ``excluded``: token ids never fed (special ones). ``windows``: the sliding windows among the artifact's states.
    ``max_positions``: what the config says the model was made for; rows stay within it. ``cached``: whether a call
    continues from the one before; without a cache every text is one call.
    ``in_slots``: the cache has a fixed number of slots; they are filled to the last, and calls of padding alone change nothing.
    """
    ceiling = min(length for length in (limits.max_length, max_positions, 1 << 62) if length)
    shapes = [
        *_basic(),
        *_window_shapes(limits, windows),
        *_recompute_shapes(limits),
        *_full_length_shapes(limits, max_positions, cached, longest if in_slots else SMALL_MAX_LENGTH),
        *(_slot_shapes(limits, longest) if in_slots else ()),
    ]
    if not cached:
        shapes = [replace(shape, decode=0) for shape in shapes if not shape.chunks]
    shapes = [shape for shape in shapes if shape.longest <= ceiling or not shape.lawful]
    run = [shape for shape in shapes if shape.longest <= longest]
    pool = pool_rows(max((shape.longest for shape in run), default=0), vocab_size, excluded, seed)
    return [_fill(shape, limits, pool, longest, vocab_size, cached, in_slots) for shape in shapes]


def of_images() -> list[Scenario]:
    """Return the scenarios of a model that reads images, each of which must get the same answer in any batch, at any place."""
    asked = {
        "single-image": ("one image", RANDOM[:1]),
        "batch-2": ("two images", RANDOM[:2]),
        "batch-5": ("five images", RANDOM),
        "batch-5-turned": ("the same five images, each at another place", (*RANDOM[2:], *RANDOM[:2])),
        "plain-images": ("images of one brightness, or with pixels at both ends of the range, around an ordinary one", (*PLAIN, RANDOM[0])),
    }
    return [Scenario(name, why, tuple((number,) for number in images), (1,) * len(images)) for name, (why, images) in asked.items()]


def unknown(names: Iterable[str]) -> dict[str, str]:
    """Return the names that no scenario of any model has, each with the nearest that some model's has."""
    fixed = [shape.name for shape in _basic()] + ["full-length", "past-full-length", "full-length-right"]
    fixed += [scenario.name for scenario in of_images()]
    return {name: nearest(name, fixed) for name in names if not NAMES.fullmatch(name)}


def pool_rows(length: int, vocab_size: int, excluded: Iterable[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Return as many rows as the largest batch has, of seeded tokens that are not ``excluded``.

    Raises:
        ValueError: all of them are.
    """
    allowed = np.setdiff1d(np.arange(vocab_size), np.fromiter(excluded, dtype=np.int64))
    if not len(allowed):
        raise ValueError("every token id is excluded: no scenario can be built")
    return [tuple(int(i) for i in np.random.default_rng([seed, row]).choice(allowed, length)) for row in range(POOL)]


def _fill(
    shape: _Shape, limits: Limits, pool: list[tuple[int, ...]], longest: int, vocab_size: int, cached: bool, in_slots: bool
) -> Scenario:
    refuse = shape.refuse or _forbidden(shape, limits, in_slots)
    not_run = f"needs rows of {shape.longest} tokens, the longest tried is {longest}" if shape.longest > longest else ""
    chunks = () if not_run or refuse or shape.chunks or not cached else _chunks(shape, limits, vocab_size)
    return Scenario(
        name=shape.name,
        why=shape.why,
        rows=() if not_run else tuple(pool[row][: prompt + shape.decode] for row, prompt in enumerate(shape.prompts)),
        prompts=shape.prompts,
        padding=shape.padding,
        chunks=shape.chunks or chunks,
        decode=shape.decode,
        recompute_at=limits.recompute_at if shape.lawful else None,
        refuse=refuse,
        not_run=not_run,
    )


def _forbidden(shape: _Shape, limits: Limits, in_slots: bool) -> str:
    """Return the limit that forbids the shape, or nothing."""
    padded = len(set(shape.prompts)) > 1
    left = shape.padding == "left" and not (in_slots and _ends_with_calls(shape))
    if padded and (limits.padding == "none" or (limits.padding == "right" and left)):
        return f"padding: {limits.padding}"
    if shape.chunks and len(shape.prompts) > 1 and not limits.batched_chunk:
        return "batched_chunk: false"
    return ""


def _ends_with_calls(shape: _Shape) -> bool:
    """Return whether the padding before each row ends where a call does, so that no call has a token after padding."""
    ends = {sum(shape.chunks[:count]) for count in range(len(shape.chunks) + 1)}
    return all(max(shape.prompts) - prompt in ends for prompt in shape.prompts)


def _chunks(shape: _Shape, limits: Limits, vocab_size: int) -> tuple[int, ...]:
    """Return how to cut the prompt so that one call's logits stay small, nothing where it need not or may not be cut."""
    width, rows = max(shape.prompts), len(shape.prompts)
    size = max(1, LOGITS_BYTES // (4 * vocab_size * rows))
    crosses = limits.recompute_at is not None and width > limits.recompute_at
    if width <= size or crosses or (rows > 1 and not limits.batched_chunk):
        return ()
    return (*(size,) * (width // size), *((width % size,) if width % size else ()))


def _basic() -> list[_Shape]:
    ragged, steps = (11, 3, 6), 8
    return [
        _Shape("single-prompt", "one row, one call, chained steps", (7,), decode=steps),
        _Shape("ragged-left", "rows of unequal length, padded before", ragged, "left", decode=steps),
        _Shape("ragged-right", "rows of unequal length, padded between prompt and continuation", ragged, "right", decode=steps),
        _Shape("chunked-prefill", "a prompt in pieces, one of them a single token", (13,), chunks=(5, 1, 7), decode=2),
        _Shape("chunked-prefill-batch", "pieces of several rows over a cache", (9, 9), chunks=(4, 5), decode=2),
        # The second row's first piece is padding alone: a fully masked row must not leave NaN in the cache.
        _Shape("chunked-prefill-left", "pieces that hold nothing but padding", (9, 4, 13), "left", chunks=(4, 5, 4), decode=2),
        _Shape("batch-2", "two rows of equal length", (5, 5), decode=2),
        _Shape("batch-5", "five rows of equal length", (4, 4, 4, 4, 4), decode=2),
        _Shape("untraced-length", "longer than anything traced", (37,), decode=3),
        _Shape("length-1", "a prompt of one token", (1,), decode=4),
        _Shape("length-1-left", "a prompt of one token among longer ones, padded before", (1, 9, 4), "left", decode=3),
        _Shape("length-1-right", "a prompt of one token among longer ones, padded after", (1, 9, 4), "right", decode=3),
    ]


def _window_shapes(limits: Limits, windows: Iterable[int]) -> Iterator[_Shape]:
    for window in sorted(set(windows)):
        prompts = (window + 5, max(1, window - 3), max(1, min(9, window // 2)))
        why = f"prefill longer than the window of {window}, and steps that cross it"
        yield _Shape(f"past-window-{window}-left", why, prompts, "left", decode=8)
        yield _Shape(f"past-window-{window}-right", why, prompts, "right", decode=8)
        if limits.padding == "none":
            yield _Shape(f"past-window-{window}", why, (window + 5,), decode=8)
            yield _Shape(f"across-window-{window}", why, (max(1, window - 3),), decode=8)


def _recompute_shapes(limits: Limits) -> Iterator[_Shape]:
    limit = limits.recompute_at
    if limit is None:
        return
    short, ragged = max(1, limit - 3), (limit + 5, max(1, limit - 3), min(4, limit))
    why = f"the rotary frequencies change past {limit} tokens"
    yield _Shape(f"beyond-{limit}", f"prompt longer: {why}", (limit + 5,), decode=3)
    yield _Shape(f"across-{limit}", f"steps that cross: {why}", (short,), decode=8)
    yield _Shape(f"across-{limit}-left", f"one row beyond, one crossing, one short: {why}", ragged, "left", decode=8)
    yield _Shape(f"across-{limit}-right", f"one row beyond, one crossing, one short: {why}", ragged, "right", decode=8)
    refuse = f"recompute_at: {limit}"
    yield _Shape(f"continued-past-{limit}", f"must be refused: {why}", (short,), decode=8, lawful=False, refuse=refuse)


def _full_length_shapes(limits: Limits, max_positions: int | None, cached: bool, driven: int) -> Iterator[_Shape]:
    # A limit is driven to its end; what the config merely says only where the other scenarios may be too long for it.
    made_for = max_positions if max_positions and max_positions <= FEW_POSITIONS else None
    length = min((known for known in (limits.max_length, made_for) if known), default=driven + 1)
    if length > driven:
        return
    steps = min(4, length - 1) if cached else 0
    yield _Shape("full-length", f"up to exactly {length} tokens", (length - steps,), decode=steps)
    if length != limits.max_length:
        return
    refuse = f"max_length: {length}"
    beyond, step = (length, 1) if cached else (length + 1, 0)
    yield _Shape("past-full-length", f"must be refused: more than {length} tokens", (beyond,), decode=step, lawful=False, refuse=refuse)


def _slot_shapes(limits: Limits, driven: int) -> Iterator[_Shape]:
    yield _Shape("decode-16", "a prompt and the steps that an engine is measured on where it runs", (16,), decode=16)
    length = limits.max_length
    if length is None or not FEWEST_SLOTS <= length <= driven:
        return
    why = f"a row that ends in slot {length} beside one whose padding is written as far and is then overwritten"
    yield _Shape("full-length-right", why, (length - 4, length // 3), "right", decode=4)
