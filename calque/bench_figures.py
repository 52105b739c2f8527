"""What runs say: medians, percentiles of single steps, ratios within rounds; and the table that shows them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from calque.console import size, table

# Measured side by side twice on an idle machine, bandwidth differs by less.
WIDE = 1.25
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Subject:
    """One artifact; ``bytes_per_call``: weights that a call reads, None where the file does not say."""

    folder: str
    kind: str
    target: str
    precision: str
    max_length: int | None
    vocabulary: int
    bytes_per_call: int | None


@dataclass(frozen=True)
class Run:
    """One run of one artifact: the seconds to the first token and of each step after it; of an encoder, of each call."""

    place: int
    round: int
    length: int
    seconds: tuple[float, ...]


def results(
    subjects: Sequence[Subject], runs: Sequence[Run], peaks: Sequence[int], rates: Sequence[float], loop: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``kind``, the loop's settings, ``bandwidth_bytes_per_s``, ``artifacts`` with their ``lengths``, and ``notes``."""
    kind, lengths = subjects[0].kind, list(dict.fromkeys(run.length for run in runs))
    measure = _decoding if kind == "generator" else partial(_encoding, rows=loop.get("batch_size", 1))
    artifacts: list[dict[str, Any]] = []
    for place, subject in enumerate(subjects):
        found = [measure(subject, _of(runs, place, length), _of(runs, 0, length), rates) for length in lengths]
        artifacts.append(
            {
                "folder": subject.folder,
                "target": subject.target,
                "precision": subject.precision,
                "weight_bytes_per_call": subject.bytes_per_call,
                "peak_rss_bytes": peaks[place],
                "lengths": found,
            }
        )
    notes = _notes(artifacts, rates)
    return {"kind": kind, **loop, "prompt_tokens": lengths, "bandwidth_bytes_per_s": list(rates), "artifacts": artifacts, "notes": notes}


def _of(runs: Iterable[Run], place: int, length: int) -> list[Run]:
    return [run for run in runs if (run.place, run.length) == (place, length)]


def _decoding(subject: Subject, runs: Sequence[Run], first: Sequence[Run], rates: Sequence[float]) -> dict[str, Any]:
    speeds, firsts = [_steps_per_s(run) for run in runs], [_steps_per_s(run) for run in first]
    found: dict[str, Any] = {"prompt_tokens": runs[0].length, "ttft_ms": _spread([1e3 * run.seconds[0] for run in runs])}
    found["ttft_ratio"] = _paired([run.seconds[0] for run in first], [run.seconds[0] for run in runs])
    steps = [1e3 * second for run in runs for second in run.seconds[1:]]
    if not steps:  # one new token is the first one
        return found | {"tpot_ms": None, "tokens_per_s": None, "step_ms": None, "bandwidth_share": None, "tokens_per_s_ratio": None}
    return found | {
        "tpot_ms": _spread([1e3 / speed for speed in speeds]),
        "tokens_per_s": _spread(speeds),
        "step_ms": percentiles(steps),
        "bandwidth_share": _share(subject, runs, speeds, rates),
        "tokens_per_s_ratio": _paired(speeds, firsts),
    }


def _encoding(subject: Subject, runs: Sequence[Run], first: Sequence[Run], rates: Sequence[float], rows: int) -> dict[str, Any]:
    speeds, firsts = [[rows * len(run.seconds) / sum(run.seconds) for run in some] for some in (runs, first)]
    return {
        "prompt_tokens": runs[0].length,
        "texts_per_s": _spread(speeds),
        "call_ms": percentiles([1e3 * second for run in runs for second in run.seconds]),
        "texts_per_s_ratio": _paired(speeds, firsts),
    }


def _steps_per_s(run: Run) -> float:
    steps = run.seconds[1:]
    return len(steps) / sum(steps) if steps else 0.0


def _share(subject: Subject, runs: Sequence[Run], speeds: Sequence[float], rates: Sequence[float]) -> float | None:
    """Return which part of the bandwidth that was measured around each round the weights took."""
    if subject.bytes_per_call is None:
        return None
    around = [(rates[run.round] + rates[run.round + 1]) / 2 for run in runs]
    return statistics.median(subject.bytes_per_call * speed / rate for speed, rate in zip(speeds, around, strict=True))


def _paired(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios within each round: a slow minute meets both."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return ``p50``, ``p90`` and ``p99``: the smallest value that so many of a hundred do not pass."""
    ordered = sorted(values)
    return {f"p{part}": ordered[-(-part * len(ordered) // 100) - 1] for part in PERCENTILES}


def _notes(artifacts: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> list[str]:
    notes = []
    if max(rates) > WIDE * min(rates):
        low, high = min(rates) / 1e9, max(rates) / 1e9
        notes.append(f"memory was read at {low:.1f} to {high:.1f} GB/s between the rounds: something else ran, trust the ratios alone")
    if any(artifact["target"] == "coreml" for artifact in artifacts) and sys.platform != "darwin":
        notes.append("Core ML's packages ran in an interpreter here, whose times say nothing of a Mac or a phone")
    if any((length.get("bandwidth_share") or 0) > 1 for artifact in artifacts for length in artifact["lengths"]):
        notes.append("a share of bandwidth above 100 %: the weights fit into the processor's caches, or the machine was busier meanwhile")
    return notes


def bench_text(found: Mapping[str, Any]) -> str:
    """Return what was measured as tables, one a length, with its notes."""
    rows = _decoding_row if found["kind"] == "generator" else _encoding_row
    heads = DECODING if found["kind"] == "generator" else ENCODING
    several = len(found["artifacts"]) > 1
    parts = []
    for place, length in enumerate(found["prompt_tokens"]):
        cells = [rows(artifact, artifact["lengths"][place], several) for artifact in found["artifacts"]]
        count = found.get("batch_size", 1)
        many = f"{count} texts" if count > 1 else "one text"
        title = f"prompt of {length} tokens, {found['new_tokens']} new" if rows is _decoding_row else f"{many} of {length} tokens a call"
        title += f", {count} rows" if rows is _decoding_row and count > 1 else ""
        parts.append(f"{title}\n\n{table(heads if several else [head for head in heads if not head.startswith('×')], cells)}")
    rates = [rate / 1e9 for rate in found["bandwidth_bytes_per_s"]]
    if several:
        parts.append("× is how much faster than the first artifact, the median of the rounds")
    read = f"memory read at {statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f}) GB/s"
    threads = _counted(found["threads"], "thread") if found["threads"] else "a thread for each core"
    parts.append("\n".join([f"{_counted(found['rounds'], 'round')}, {threads}, {read}", *(f"note: {note}" for note in found["notes"])]))
    return "\n\n".join(parts)


DECODING = ("artifact", "TTFT ms", "× TTFT", "tokens/s", "× tokens/s", "TPOT ms", "p50", "p90", "p99", "bandwidth", "peak memory")
ENCODING = ("artifact", "texts/s", "× texts/s", "ms p50", "p90", "p99", "peak memory")


def _decoding_row(artifact: Mapping[str, Any], length: Mapping[str, Any], several: bool) -> list[str]:
    share = length["bandwidth_share"]
    return [
        artifact["folder"],
        _cell(length["ttft_ms"]),
        *([_ratio(length["ttft_ratio"])] if several else []),
        _cell(length["tokens_per_s"]),
        *([_ratio(length["tokens_per_s_ratio"])] if several else []),
        "–" if length["tpot_ms"] is None else f"{length['tpot_ms']['median']:.2f}",
        *_percentile_cells(length["step_ms"]),
        "–" if share is None else f"{share:.0%}",
        size(artifact["peak_rss_bytes"]),
    ]


def _encoding_row(artifact: Mapping[str, Any], length: Mapping[str, Any], several: bool) -> list[str]:
    return [
        artifact["folder"],
        _cell(length["texts_per_s"]),
        *([_ratio(length["texts_per_s_ratio"])] if several else []),
        *_percentile_cells(length["call_ms"]),
        size(artifact["peak_rss_bytes"]),
    ]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _percentile_cells(found: Mapping[str, float] | None) -> list[str]:
    return ["–" if found is None else f"{found[f'p{part}']:.2f}" for part in PERCENTILES]


def _cell(spread: Mapping[str, float] | None) -> str:
    return "–" if spread is None else f"{spread['median']:.1f} ({spread['min']:.1f}–{spread['max']:.1f})"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
