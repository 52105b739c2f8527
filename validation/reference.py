"""What the untouched eager model says, row by row alone and unpadded: whole for the proof, thinned for the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from calque.errors import ArtifactUnreadable, SourceUnreadable
from calque.validation.eager import asked, eager_outputs
from calque.validation.rounding import rounded_activations
from calque.validation.scenarios import PAD, Scenario, calls

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from calque.artifact import TensorSpec
    from calque.validation.drive import ModelIO
    from calque.validation.rounding import Rounding

    Key = tuple[int, bool]
    # What to feed the eager model, on a side of ``recompute_at``: a row, whatever its length, or its tokens where those after change all.
    PoolKey = tuple[tuple[int, ...], bool]
    Outputs = dict[str, NDArray[np.float32]]

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
    """What is known of one output of one row: at ``positions`` (ascending) its values, the largest and its lead over the next."""

    positions: NDArray[np.int64]
    values: NDArray[np.float32]
    top: NDArray[np.int64]
    margin: NDArray[np.float32]

    def at(self, positions: NDArray[np.int64]) -> Table:
        """Return the table of those positions alone, in that order.

        Raises:
            KeyError: a position is not in the table.
        """
        where = np.searchsorted(self.positions, positions)
        if len(positions) and (where.max(initial=0) >= len(self.positions) or not np.array_equal(self.positions[where], positions)):
            raise KeyError(f"the reference holds nothing at some of the positions {positions.tolist()}")
        # Positions of one call follow each other: slice, so that a mapped file is not copied as a whole.
        first = int(where[0]) if len(where) else 0
        run = slice(first, first + len(where)) if np.array_equal(where, np.arange(first, first + len(where))) else where
        return Table(positions, self.values[run], self.top[run], self.margin[run])


@dataclass(frozen=True)
class Reference:
    """What is expected of one output in one scenario.

    ``columns``: which of its last axis (of logits: the vocabulary) ``values`` hold, None meaning all. ``sigmas``: per row,
    the standard deviation of all its values. ``tables``: per row and side of ``recompute_at``. ``rounding``: how far, in σ,
    8 bits for what products read moved a value of it at most, and ``mean_rounding`` in the mean; 0 where that was not asked for.
    """

    columns: NDArray[np.int64] | None
    sigmas: tuple[float, ...]
    tables: Mapping[Key, Table]
    rounding: float = 0.0
    mean_rounding: float = 0.0


def needed(scenario: Scenario) -> dict[Key, NDArray[np.int64]]:
    """Return the positions that the scenario's calls reach, per row and side of ``recompute_at``, ascending."""
    found: dict[Key, set[int]] = {}
    if scenario.refuse or scenario.not_run:
        return {}
    for call in calls(scenario):
        for row, beyond in enumerate(call.beyond):
            found.setdefault((row, beyond), set()).update(int(i) for i in call.index[row] if i != PAD)
    return {key: np.array(sorted(positions), dtype=np.int64) for key, positions in sorted(found.items()) if positions}


def predicted_bytes(scenarios: Sequence[Scenario], outputs: Sequence[TensorSpec]) -> int:
    """Return about how many bytes `store_reference` will write for outputs whose last axis is a number."""
    places = sum(len(positions) for scenario in scenarios for positions in needed(scenario).values())
    values = sum(size for spec in outputs if isinstance(size := spec.shape[-1], int))
    return min(BUDGET, places * (values * np.float32().itemsize + POSITION_BYTES) + NPZ_OVERHEAD * len(scenarios))


def working_bytes(scenarios: Sequence[Scenario], outputs: Sequence[TensorSpec], cached: bool) -> int:
    """Return how many bytes `store_reference` keeps in its scratch folder; ``cached``: the artifact has states."""
    tokens = sum(map(len, _pool_rows([scenario for scenario in scenarios if not scenario.not_run], prefixes=cached).values()))
    return tokens * sum(size for spec in outputs if isinstance(size := spec.shape[-1], int)) * np.float32().itemsize


def store_reference(
    load_eager: Callable[[], torch.nn.Module],
    scenarios: Sequence[Scenario],
    io: ModelIO,
    folder: Path,
    scratch: Path,
    expected: Callable[[Outputs], Outputs] = dict,
    budget: int = BUDGET,
    rounding: Mapping[str, Rounding] | None = None,
) -> dict[str, dict[str, Reference]]:
    """``folder/reference`` holds one npz a scenario, at most ``budget`` bytes together; return the whole references by output.

    What the whole references hold lies in files of ``scratch``, mapped, and is good as long as these stay. One eager
    forward is made for each pool row, batch 1, no padding, no cache; one more where the row also grows past
    ``recompute_at``. Without a cache what comes later in a text changes what came before: each length is one forward.
    ``expected``: what the passes make of the outputs of one row. ``rounding``: what becomes of the values that products with those
    parameters read; then every row is run a second time, rounded.

    Raises:
        SourceUnreadable: the eager model's own outputs are not finite.
    """
    scenarios = [scenario for scenario in scenarios if not scenario.not_run]
    pool = _pool_rows(scenarios, prefixes=bool(io.states))
    measured, moved = _forward_pool(load_eager, pool, io, expected, scratch, rounding or {}) if pool else ({}, {})
    references = {scenario.name: _gather(scenario, io, measured, moved) for scenario in scenarios}
    (folder / FOLDER).mkdir(exist_ok=True)
    columns = {spec.name: _columns(scenarios, references, spec, budget // len(io.outputs)) for spec in io.outputs}
    for scenario in scenarios:
        _write(folder / FOLDER / f"{scenario.name}.npz", scenario, references[scenario.name], columns)
    return references


def _pool_rows(scenarios: Sequence[Scenario], prefixes: bool) -> dict[PoolKey, tuple[int, ...]]:
    """Return what to feed the eager model: the longest need of each row, or each of its lengths if prefixes say nothing."""
    pool: dict[PoolKey, tuple[int, ...]] = {}
    for scenario in scenarios:
        for (row, beyond), positions in needed(scenario).items():
            tokens = scenario.rows[row][: int(positions[-1]) + 1]
            key = _pool_key((row, beyond), tokens, prefixes)
            known = pool.get(key, ())
            longer, shorter = (tokens, known) if len(tokens) > len(known) else (known, tokens)
            if longer[: len(shorter)] != shorter:
                raise ValueError(f"row {row} of scenario {scenario.name} is not a prefix of the same pool sequence as in the others")
            pool[key] = longer
    return pool


def _pool_key(key: Key, tokens: tuple[int, ...], prefixes: bool) -> PoolKey:
    row, beyond = key
    return ((row,) if prefixes else tokens), beyond


def _forward_pool(
    load_eager: Callable[[], torch.nn.Module],
    pool: Mapping[PoolKey, tuple[int, ...]],
    io: ModelIO,
    expected: Callable[[Outputs], Outputs],
    scratch: Path,
    rounding: Mapping[str, Rounding],
) -> tuple[dict[PoolKey, dict[str, Table]], dict[PoolKey, dict[str, tuple[float, float]]]]:
    """Return the eager model's answer to each pool row, by output, values mapped from ``scratch``; and how far rounding moves it."""
    model = load_eager().eval()
    measured: dict[PoolKey, dict[str, Table]] = {}
    moved: dict[PoolKey, dict[str, tuple[float, float]]] = {}
    for number, (key, tokens) in enumerate(sorted(pool.items())):
        outputs = expected(eager_outputs(model, tokens, io.inputs))
        if missing := [spec.name for spec in io.outputs if spec.name not in outputs]:
            raise SourceUnreadable(f"the eager model gives no {', '.join(missing)}; it gives {', '.join(outputs)}", fix="report this")
        measured[key] = {
            spec.name: _table(outputs[spec.name], spec, scratch / f"{spec.name}-{number}.npy", len(tokens), asked(tokens, io.inputs))
            for spec in io.outputs
        }
        if rounding:
            with rounded_activations(model, rounding):
                rounded = expected(eager_outputs(model, tokens, io.inputs))
            moved[key] = {spec.name: _moved(rounded[spec.name], outputs[spec.name]) for spec in io.outputs}
    return measured, moved


def _moved(rounded: NDArray[np.float32], exact: NDArray[np.float32]) -> tuple[float, float]:
    """Return the largest and the mean difference."""
    delta = np.abs(rounded - exact)
    return float(delta.max()), float(delta.mean(dtype=np.float64))


def _table(array: NDArray[np.float32], spec: TensorSpec, path: Path, tokens: int, given: str) -> Table:
    """Return one output of one row, [positions, size], whatever axes it has; ``given``: what the model was, in words."""
    np.save(path, array.reshape(tokens if _each_position(spec) else 1, -1))
    values = np.load(path, mmap_mode="r")
    if not all(np.isfinite(values[start : start + STEP]).all() for start in range(0, len(values), STEP)):
        raise SourceUnreadable(
            f"the eager model's own {spec.name} hold NaN or infinity on {given}",
            fix="check the weights; nothing can be proved against such a model",
        )
    top, margin = _leaders(values)
    return Table(np.arange(len(values)), values, top, margin)


def _each_position(spec: TensorSpec) -> bool:
    """Return whether an output speaks of every position; if not, of each row as a whole."""
    return len(spec.shape) == 3 or "sequence_length" in spec.shape


def _leaders(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return each position's likeliest token and its lead over the second, in logits."""
    tops, margins = [], []
    for start in range(0, len(logits), STEP):
        piece = np.asarray(logits[start : start + STEP])
        two = np.partition(piece, piece.shape[1] - 2, axis=1)[:, -2:] if piece.shape[1] > 1 else np.repeat(piece, 2, axis=1)
        tops.append(piece.argmax(axis=1))
        margins.append(two[:, 1] - two[:, 0])
    return np.concatenate(tops), np.concatenate(margins)


def _gather(
    scenario: Scenario, io: ModelIO, measured: Mapping[PoolKey, dict[str, Table]], moved: Mapping[PoolKey, dict[str, tuple[float, float]]]
) -> dict[str, Reference]:
    return {spec.name: _gather_one(scenario, spec, io, measured, moved) for spec in io.outputs}


def _gather_one(
    scenario: Scenario,
    spec: TensorSpec,
    io: ModelIO,
    measured: Mapping[PoolKey, dict[str, Table]],
    moved: Mapping[PoolKey, dict[str, tuple[float, float]]],
) -> Reference:
    found = needed(scenario)
    fed = {key: scenario.rows[key[0]][: int(positions[-1]) + 1] for key, positions in found.items()}
    pooled = {key: _pool_key(key, tokens, bool(io.states)) for key, tokens in fed.items()}
    tables = {key: measured[pooled[key]][spec.name] for key in found}
    if not io.states:
        # A text may have as little as one value: what is spread is measured over all texts.
        spread = _sigma([outputs[spec.name] for outputs in measured.values()])
        far, mean = np.array([(0.0, 0.0), *(outputs[spec.name] for outputs in moved.values())]).max(axis=0) / spread
        return Reference(None, (spread,) * len(scenario.prompts), tables, float(far), float(mean))
    rows = range(len(scenario.prompts))
    sigmas = tuple(_sigma([tables[key].at(positions) for key, positions in found.items() if key[0] == row]) for row in rows)
    each = [np.array(moved[pooled[key]][spec.name]) / sigmas[key[0]] for key in found if moved]
    far, mean = np.array([np.zeros(2), *each]).max(axis=0)
    return Reference(None, sigmas, tables, float(far), float(mean))


def _sigma(tables: Sequence[Table]) -> float:
    """Return the standard deviation of all the tables' values, summed in float64 and in pieces."""
    count, total, squares = 0, 0.0, 0.0
    for table in tables:
        for start in range(0, len(table.values), STEP):
            piece = np.asarray(table.values[start : start + STEP], dtype=np.float64)
            count, total, squares = count + piece.size, total + float(piece.sum()), squares + float((piece * piece).sum())
    if not count:
        return 1.0
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5 or 1.0


def _parts(scenario: Scenario, reference: Reference) -> list[tuple[Key, Table]]:
    """Return what the scenario needs of the reference: the positions that it reaches, or the one of the row as a whole."""
    found = needed(scenario)
    return [(key, table if len(table.positions) == 1 else table.at(found[key])) for key, table in reference.tables.items()]


def _columns(
    scenarios: Sequence[Scenario], references: Mapping[str, Mapping[str, Reference]], spec: TensorSpec, budget: int
) -> NDArray[np.int64] | None:
    """Return the evenly spaced entries of an output's last axis for which the budget suffices; None if it suffices for all."""
    tables = [table for s in scenarios for _, table in _parts(s, references[s.name][spec.name])]
    positions = sum(len(table.positions) for table in tables)
    if not positions:
        return None
    size = tables[0].values.shape[1]
    tokens = sum(len(row) for scenario in scenarios for row in scenario.rows)
    fixed = NPZ_OVERHEAD * len(scenarios) + 4 * tokens + POSITION_BYTES * positions
    # The list of columns itself is in every file.
    room = (budget - fixed) // (4 * (positions + len(scenarios)))
    if room >= size:
        return None
    return np.unique(np.linspace(0, size - 1, max(FEWEST_COLUMNS, room)).astype(np.int64))


def _write(path: Path, scenario: Scenario, references: Mapping[str, Reference], columns: Mapping[str, NDArray[np.int64] | None]) -> None:
    about = asdict(scenario)
    del about["rows"], about["not_run"]
    arrays: dict[str, Any] = {}
    for name, reference in references.items():
        arrays |= {f"{name}.{field}": array for field, array in _arrays(scenario, reference, columns[name]).items()}
    # np.savez dates every member 1980-01-01, so equal arrays give equal bytes.
    np.savez(
        path,
        scenario=np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8),
        tokens=np.array([token for row in scenario.rows for token in row], dtype=np.int32),
        **arrays,
    )


def _arrays(scenario: Scenario, reference: Reference, columns: NDArray[np.int64] | None) -> dict[str, NDArray[np.generic]]:
    parts = _parts(scenario, reference)
    chosen = slice(None) if columns is None else columns
    return {
        "sigmas": np.array(reference.sigmas, dtype=np.float64),
        "rounding": np.array([reference.rounding, reference.mean_rounding], dtype=np.float64),
        "columns": np.array([] if columns is None else columns, dtype=np.int32),
        "row": np.concatenate([np.full(len(t.positions), key[0], np.int16) for key, t in parts] or [np.zeros(0, np.int16)]),
        "beyond": np.concatenate([np.full(len(t.positions), key[1], np.bool_) for key, t in parts] or [np.zeros(0, np.bool_)]),
        "position": np.concatenate([t.positions.astype(np.int32) for _, t in parts] or [np.zeros(0, np.int32)]),
        "top": np.concatenate([t.top.astype(np.int32) for _, t in parts] or [np.zeros(0, np.int32)]),
        "margin": np.concatenate([t.margin for _, t in parts] or [np.zeros(0, np.float32)]),
        "values": np.concatenate([t.values[:, chosen] for _, t in parts] or [np.zeros((0, 0), np.float32)]),
    }


def read_references(folder: Path) -> Iterator[tuple[Scenario, dict[str, Reference]]]:
    """Yield every stored scenario and what the eager model said, by output, one scenario in memory at a time.

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


def _read(path: Path) -> tuple[Scenario, dict[str, Reference]]:
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
    outputs = dict.fromkeys(name.rpartition(".")[0] for name in data if "." in name)
    return scenario, {
        output: _reference({name.rpartition(".")[2]: data[name] for name in data if name.startswith(output + ".")}) for output in outputs
    }


def _reference(data: Mapping[str, NDArray[Any]]) -> Reference:
    tables = {}
    for row, beyond in sorted(set(zip(data["row"].tolist(), data["beyond"].tolist(), strict=True))):
        part = (data["row"] == row) & (data["beyond"] == beyond)
        tables[row, beyond] = Table(
            data["position"][part].astype(np.int64), data["values"][part], data["top"][part].astype(np.int64), data["margin"][part]
        )
    columns = data["columns"].astype(np.int64) if len(data["columns"]) else None
    return Reference(columns, tuple(data["sigmas"].tolist()), tables, *data["rounding"].tolist())
