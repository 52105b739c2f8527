"""What the untouched eager model says, row by row alone and unpadded: whole for the proof, thinned for the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from calque.errors import ArtifactUnreadable, SourceUnreadable
from calque.validation.scenarios import PAD, Scenario, calls

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Key = tuple[int, bool]

FOLDER = "reference"
BUDGET = 8_000_000
# Bytes of an npz beside its arrays' own, and of one position beside its logits: position, row, beyond, top token, margin.
NPZ_OVERHEAD = 4096
POSITION_BYTES = 15
# Fewer columns would leave a fault room to hide; a budget that small is a mistake.
FEWEST_COLUMNS = 16
# How many positions are converted at a time, so that float64 statistics of a large vocabulary stay small.
STEP = 64


@dataclass(frozen=True)
class Table:
    """What is known of one row: at ``positions`` (ascending) the logits, the likeliest token and its lead over the next."""

    positions: NDArray[np.int64]
    logits: NDArray[np.float32]
    top: NDArray[np.int64]
    margin: NDArray[np.float32]

    def at(self, positions: NDArray[np.int64]) -> Table:
        """Return the table of those positions alone, in that order.

        Raises:
            KeyError: a position is not in the table.
        """
        where = np.searchsorted(self.positions, positions)
        if len(positions) and (where.max(initial=0) >= len(self.positions) or not np.array_equal(self.positions[where], positions)):
            raise KeyError(f"the reference holds no logits at some of the positions {positions.tolist()}")
        # Positions of one call follow each other: slice, so that a mapped file is not copied as a whole.
        first = int(where[0]) if len(where) else 0
        run = slice(first, first + len(where)) if np.array_equal(where, np.arange(first, first + len(where))) else where
        return Table(positions, self.logits[run], self.top[run], self.margin[run])


@dataclass(frozen=True)
class Reference:
    """The expected logits of one scenario.

    ``columns``: which vocabulary entries ``logits`` holds, None meaning all. ``sigmas``: per row, the standard deviation
    of all its logits in this scenario. ``tables``: per row and side of ``recompute_at``.
    """

    columns: NDArray[np.int64] | None
    sigmas: tuple[float, ...]
    tables: Mapping[Key, Table]


def needed(scenario: Scenario) -> dict[Key, NDArray[np.int64]]:
    """Return the positions that the scenario's calls reach, per row and side of ``recompute_at``, ascending."""
    found: dict[Key, set[int]] = {}
    if scenario.refuse or scenario.not_run:
        return {}
    for call in calls(scenario):
        for row, beyond in enumerate(call.beyond):
            found.setdefault((row, beyond), set()).update(int(i) for i in call.index[row] if i != PAD)
    return {key: np.array(sorted(positions), dtype=np.int64) for key, positions in sorted(found.items()) if positions}


def store_reference(
    load_eager: Callable[[], torch.nn.Module],
    scenarios: Sequence[Scenario],
    folder: Path,
    scratch: Path,
    budget: int = BUDGET,
) -> dict[str, Reference]:
    """``folder/reference`` holds one npz a scenario, at most ``budget`` bytes together; return the whole references.

    The whole logits lie in files of ``scratch``, mapped, and are good as long as these stay. One eager forward is made
    for each pool row, batch 1, no padding, no cache; one more where the row also grows past ``recompute_at``.

    Raises:
        SourceUnreadable: the eager model's own logits are not finite.
    """
    scenarios = [scenario for scenario in scenarios if not scenario.not_run]
    pool = _pool_rows(scenarios)
    measured = _forward_pool(load_eager, pool, scratch) if pool else {}
    references = {scenario.name: _gather(scenario, measured) for scenario in scenarios}
    (folder / FOLDER).mkdir(exist_ok=True)
    columns = _columns(scenarios, references, budget)
    for scenario in scenarios:
        _write(folder / FOLDER / f"{scenario.name}.npz", scenario, references[scenario.name], columns)
    return references


def _pool_rows(scenarios: Sequence[Scenario]) -> dict[Key, tuple[int, ...]]:
    """Return what to feed the eager model: the longest need of each row, on each side of ``recompute_at``."""
    pool: dict[Key, tuple[int, ...]] = {}
    for scenario in scenarios:
        for (row, beyond), positions in needed(scenario).items():
            tokens = scenario.rows[row][: int(positions[-1]) + 1]
            known = pool.get((row, beyond), ())
            longer, shorter = (tokens, known) if len(tokens) > len(known) else (known, tokens)
            if longer[: len(shorter)] != shorter:
                raise ValueError(f"row {row} of scenario {scenario.name} is not a prefix of the same pool sequence as in the others")
            pool[row, beyond] = longer
    return pool


def _forward_pool(load_eager: Callable[[], torch.nn.Module], pool: Mapping[Key, tuple[int, ...]], scratch: Path) -> dict[Key, Table]:
    """Return the eager model's answer to each pool row, logits mapped from ``scratch``."""
    model = load_eager().eval()
    tables = {}
    for (row, beyond), tokens in sorted(pool.items()):
        path = scratch / f"logits-{row}{'-beyond' if beyond else ''}.npy"
        np.save(path, _eager_logits(model, tokens))
        logits = np.load(path, mmap_mode="r")
        if not all(np.isfinite(logits[start : start + STEP]).all() for start in range(0, len(logits), STEP)):
            raise SourceUnreadable(
                f"the eager model's own logits hold NaN or infinity on a row of {len(tokens)} tokens",
                fix="check the weights; nothing can be proved against such a model",
            )
        top, margin = _leaders(logits)
        tables[row, beyond] = Table(np.arange(len(tokens)), logits, top, margin)
    return tables


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch compute on one thread inside the block.

    How work is cut over threads changes the last bits of sums, so the reference would differ between machines; and once
    in a few dozen runs one of two threads was seen to compute its half of a row 1e-4 σ away from all other runs.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _eager_logits(model: torch.nn.Module, tokens: Sequence[int]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode(), one_thread():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        array: NDArray[np.float32] = logits.float().numpy()
    return array


def eager_states(model: torch.nn.Module, tokens: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Return the keys and values of the row alone, by output name (``present.{i}.key``), each [1, heads, tokens, size].

    The cache is a plain ``DynamicCache``, so that sliding layers keep every position.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True)
    states = {}
    for layer, (key, value, *_) in enumerate(cache):
        for kind, tensor in (("key", key), ("value", value)):
            if tensor is not None:
                states[f"present.{layer}.{kind}"] = tensor.float().numpy()
    return states


def _leaders(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return each position's likeliest token and its lead over the second, in logits."""
    tops, margins = [], []
    for start in range(0, len(logits), STEP):
        piece = np.asarray(logits[start : start + STEP])
        two = np.partition(piece, piece.shape[1] - 2, axis=1)[:, -2:] if piece.shape[1] > 1 else np.repeat(piece, 2, axis=1)
        tops.append(piece.argmax(axis=1))
        margins.append(two[:, 1] - two[:, 0])
    return np.concatenate(tops), np.concatenate(margins)


def _gather(scenario: Scenario, measured: Mapping[Key, Table]) -> Reference:
    tables = {key: measured[key] for key in needed(scenario)}
    rows = range(len(scenario.prompts))
    sigmas = tuple(_sigma([measured[key].at(found) for key, found in needed(scenario).items() if key[0] == row]) for row in rows)
    return Reference(None, sigmas, tables)


def _sigma(tables: Sequence[Table]) -> float:
    """Return the standard deviation of all the tables' logits, summed in float64 and in pieces."""
    count, total, squares = 0, 0.0, 0.0
    for table in tables:
        for start in range(0, len(table.logits), STEP):
            piece = np.asarray(table.logits[start : start + STEP], dtype=np.float64)
            count, total, squares = count + piece.size, total + float(piece.sum()), squares + float((piece * piece).sum())
    if not count:
        return 1.0
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5 or 1.0


def _columns(scenarios: Sequence[Scenario], references: Mapping[str, Reference], budget: int) -> NDArray[np.int64] | None:
    """Return the evenly spaced vocabulary entries for which the budget suffices; None if it suffices for all."""
    tables = [(table, found) for s in scenarios for key, found in needed(s).items() for table in [references[s.name].tables[key]]]
    positions = sum(len(found) for _, found in tables)
    if not positions:
        return None
    vocabulary = tables[0][0].logits.shape[1]
    tokens = sum(len(row) for scenario in scenarios for row in scenario.rows)
    fixed = NPZ_OVERHEAD * len(scenarios) + 4 * tokens + POSITION_BYTES * positions
    # The list of columns itself is in every file.
    room = (budget - fixed) // (4 * (positions + len(scenarios)))
    if room >= vocabulary:
        return None
    return np.unique(np.linspace(0, vocabulary - 1, max(FEWEST_COLUMNS, room)).astype(np.int64))


def _write(path: Path, scenario: Scenario, reference: Reference, columns: NDArray[np.int64] | None) -> None:
    about = asdict(scenario)
    del about["rows"], about["not_run"]
    parts = [(key, reference.tables[key].at(found)) for key, found in needed(scenario).items()]
    chosen = slice(None) if columns is None else columns
    none = np.zeros((0, 0), dtype=np.float32)
    # np.savez dates every member 1980-01-01, so equal arrays give equal bytes.
    np.savez(
        path,
        scenario=np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8),
        tokens=np.array([token for row in scenario.rows for token in row], dtype=np.int32),
        sigmas=np.array(reference.sigmas, dtype=np.float64),
        columns=np.array([] if columns is None else columns, dtype=np.int32),
        row=np.concatenate([np.full(len(t.positions), key[0], np.int16) for key, t in parts] or [np.zeros(0, np.int16)]),
        beyond=np.concatenate([np.full(len(t.positions), key[1], np.bool_) for key, t in parts] or [np.zeros(0, np.bool_)]),
        position=np.concatenate([t.positions.astype(np.int32) for _, t in parts] or [np.zeros(0, np.int32)]),
        top=np.concatenate([t.top.astype(np.int32) for _, t in parts] or [np.zeros(0, np.int32)]),
        margin=np.concatenate([t.margin for _, t in parts] or [np.zeros(0, np.float32)]),
        logits=np.concatenate([t.logits[:, chosen] for _, t in parts] or [none]),
    )


def read_references(folder: Path) -> Iterator[tuple[Scenario, Reference]]:
    """Yield every stored scenario and what the eager model said, by name, one in memory at a time.

    Raises:
        ArtifactUnreadable: a file does not hold what ``store_reference`` writes, or there is none.
    """
    paths = sorted((folder / FOLDER).glob("*.npz"))
    if not paths:
        raise ArtifactUnreadable(f"{folder / FOLDER} holds no reference to validate against", fix="convert the model again")
    for path in paths:
        try:
            yield _read(path)
        except (KeyError, ValueError, TypeError, IndexError, OSError, EOFError, BadZipFile) as error:
            raise ArtifactUnreadable(f"{path} is not a reference: {error}", fix="convert the model again") from error


def _read(path: Path) -> tuple[Scenario, Reference]:
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    about: dict[str, Any] = json.loads(data["scenario"].tobytes())
    lengths = [prompt + about["decode"] for prompt in about["prompts"]]
    rows = np.split(data["tokens"].astype(np.int64), np.cumsum(lengths)[:-1])
    scenario = Scenario(
        **{
            **about,
            "rows": tuple(tuple(int(token) for token in row) for row in rows),
            "prompts": tuple(about["prompts"]),
            "chunks": tuple(about["chunks"]),
        }
    )
    tables = {}
    for row, beyond in sorted(set(zip(data["row"].tolist(), data["beyond"].tolist(), strict=True))):
        part = (data["row"] == row) & (data["beyond"] == beyond)
        tables[row, beyond] = Table(
            data["position"][part].astype(np.int64), data["logits"][part], data["top"][part].astype(np.int64), data["margin"][part]
        )
    columns = data["columns"].astype(np.int64) if len(data["columns"]) else None
    return scenario, Reference(columns, tuple(data["sigmas"].tolist()), tables)
