#!/usr/bin/env python3
"""Runs the TensorRT engine of this folder: compares it with reference/, then measures it.

::

    python run_engine.py                           # what build_engine.py wrote, on the first GPU
    python run_engine.py --prompt-tokens 512 --new-tokens 256 --json

Needs Python 3.10, numpy, an NVIDIA GPU with its CUDA runtime library, and the SDK that built the plan: `tensorrt` or `tensorrt_rtx`.
Exit code 0: every answer agrees with the eager model's; 1: the engine cannot be run; 3: numbers are wrong; 5: no SDK or no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # where type checkers find the file that lies beside this one
    from calque.targets.tensorrt_package.cuda_engine import SDKS, Cuda, Engine, Failed, Refused, above_zero, load_sdk
else:
    from cuda_engine import SDKS, Cuda, Engine, Failed, Refused, above_zero, load_sdk

Array = NDArray[Any]

FOLDER = Path(__file__).resolve().parent
# How far rounding was seen to move an output, in σ, for each layer and the head; FACTOR times that is wrong.
NOISE_PER_LAYER = {"float32": 7e-6, "float16": 1.4e-2, "bfloat16": 9e-2}
FACTOR = 2.0
NARROW = {"fp16": "float16", "bf16": "bfloat16"}
# How configs call the number of their layers.
DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# The output whose largest value is an answer: the likeliest token or label.
RANKED = "logits"
PIXELS = "pixel_values"
PAD = -1


@dataclass(frozen=True)
class Artifact:
    """What the folder says of itself."""

    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    build: Mapping[str, Any]

    @classmethod
    def read(cls) -> Artifact:
        """Return that of this script's folder."""
        files = (FOLDER / name for name in ("manifest.json", "config.json", "build.json"))
        manifest, config, build = (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files)
        if not manifest:
            raise Failed(f"{FOLDER} has no manifest.json: this script belongs into the folder it was made in")
        text = config.get("text_config")
        return cls(manifest, {**config, **text} if isinstance(text, dict) else config, build)

    @property
    def noise(self) -> float:
        """How far honest numbers may lie from the eager model's, in σ."""
        states = self.manifest["states"]
        known: str = states[0]["dtype"] if states else NARROW.get(self.manifest["precision"], "float32")
        depths = [size for key in DEPTHS if isinstance(size := self.config.get(key), int)]
        stages = self.config.get("depths")
        depths += [sum(stages)] if isinstance(stages, list) and all(isinstance(size, int) for size in stages) else []
        layers: int = max([1, *depths, *(state["layer"] + 1 for state in states)])
        return NOISE_PER_LAYER[self.build.get("arithmetic", known)] * (layers + 1)

    @property
    def outputs(self) -> list[Mapping[str, Any]]:
        """The outputs that are no states."""
        kept = {state["output"] for state in self.manifest["states"]}
        return [spec for spec in self.manifest["graphs"]["model"]["outputs"] if spec["name"] not in kept]

    def weight_bytes(self, plan_bytes: int) -> int:
        """How many bytes a step reads: those of the weights, at most those of the plan, which may hold them once a profile."""
        files = [FOLDER / self.build["onnx"], *FOLDER.glob(f"{self.build['onnx']}.data"), *FOLDER.glob("model.onnx.data")]
        found: int = sum(file.stat().st_size for file in dict.fromkeys(files) if file.is_file())
        return min(found or plan_bytes, plan_bytes)


@dataclass(frozen=True)
class Scenario:
    """One file of reference/: rows of tokens, how they are padded, cut and continued, and what the eager model says."""

    name: str
    about: Mapping[str, Any]
    rows: Sequence[Array]
    arrays: Mapping[str, Array]

    @classmethod
    def read(cls, path: Path) -> Scenario:
        """Return the scenario of one file."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays["scenario"].tobytes())
        ends = np.cumsum([prompt + about["decode"] for prompt in about["prompts"]])
        return cls(path.stem, about, np.split(arrays["tokens"].astype(np.int64), ends[:-1]), arrays)

    def calls(self) -> Iterator[tuple[Array, bool, list[bool]]]:
        """Yield each call's positions of its rows, PAD where none; whether states are empty before; which rows are past recompute_at."""
        held = np.zeros(len(self.rows), dtype=np.int64)
        limit = self.about["recompute_at"]
        for number, index in enumerate(self._columns()):
            reached = held + (index != PAD).sum(axis=1)
            crosses = limit is not None and bool(((held > 0) & (held <= limit) & (reached > limit)).any())
            beyond = [limit is not None and int(length) > limit for length in reached]
            yield padded(reached, self.about["padding"]) if crosses else index, crosses or number == 0, beyond
            held = reached

    def _columns(self) -> Iterator[Array]:
        prompts = np.array(self.about["prompts"], dtype=np.int64)
        whole = padded(prompts, self.about["padding"])
        yield from np.split(whole, np.cumsum(self.about["chunks"])[:-1].astype(int), axis=1)
        yield from ((prompts + step)[:, None] for step in range(self.about["decode"]))


def padded(lengths: Array, side: str) -> Array:
    """Return positions 0 … length-1 of each row in one rectangle, PAD elsewhere."""
    width = int(lengths.max())
    positions = np.arange(width)[None, :] - (width - lengths[:, None] if side == "left" else 0 * lengths[:, None])
    return np.where((positions >= 0) & (positions < lengths[:, None]), positions, PAD)


def inputs_of(engine: Engine, rows: Sequence[Array], index: Array, held: Array, pad_id: int) -> dict[str, Array]:
    """Return what to feed for those positions of the rows, of which ``held`` are in slots already."""
    new = index != PAD
    positions = np.clip(held[:, None] + np.cumsum(new, axis=1) - 1, 0, None)
    known = {
        "input_ids": np.stack([np.where(valid, row[at], pad_id) for row, at, valid in zip(rows, index, new, strict=True)]),
        "attention_mask": new,
        "token_type_ids": (2 * positions >= new.sum(axis=1, keepdims=True)) & new,
        "position_ids": positions,
        "write_indices": held,
        "kv_lengths": held + new.sum(axis=1),
    }
    names = [name for name in engine.inputs if name not in engine.states.values()]
    if PIXELS in names:  # an image is a row of one token, its number
        made = importlib.import_module("images")
        known[PIXELS] = made.images(known["input_ids"][:, 0], SimpleNamespace(**engine.inputs[PIXELS]))
    if unknown := sorted(set(names) - set(known)):
        raise Failed(f"this script has no rule for the inputs {', '.join(unknown)}")
    return {name: known[name] for name in names}


def answers(engine: Engine, scenario: Scenario, pad_id: int) -> Iterator[tuple[Array, list[bool], dict[str, Array]]]:
    """Yield each call's positions, which rows are past recompute_at, and its outputs; calls too wide for a profile are cut."""
    held = np.zeros(len(scenario.rows), dtype=np.int64)
    for whole, fresh, beyond in scenario.calls():
        if fresh:
            engine.reset()
            held[:] = 0
        width = whole.shape[1]
        width = engine.widest(len(held), width) if engine.states else width
        for start in range(0, whole.shape[1], width):
            index = whole[:, start : start + width]
            yield index, beyond, engine(inputs_of(engine, scenario.rows, index, held, pad_id))
            held = held + (index != PAD).sum(axis=1)


@dataclass
class Comparison:
    """How far one scenario's answers lie from the reference, in σ of each row's output, at valid positions."""

    scenario: Scenario
    noise: float
    worst: float = 0.0
    total: float = 0.0
    values: int = 0
    tokens: int = 0
    agreed: int = 0
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rounding = [array for name, array in self.scenario.arrays.items() if name.endswith(".rounding")]
        far, self.mean_limit = FACTOR * np.max([np.zeros(2), *rounding], axis=0)
        # Activations of 8 bits move values by more than the dtype does; how far, the reference has measured.
        self.limit, self.noise = max(FACTOR * self.noise, far), max(self.noise, far / FACTOR)

    def add(self, spec: Mapping[str, Any], index: Array, beyond: Sequence[bool], values: Array, cached: bool) -> None:
        """Count one output of one call."""
        whole_row = not cached and "sequence_length" not in spec["shape"]
        values = values.reshape(len(values), 1, -1) if whole_row else values
        values = values[:, :, None] if values.ndim == 2 else values
        for row, at in enumerate(np.zeros((len(index), 1), np.int64) if whole_row else index[:, index.shape[1] - values.shape[1] :]):
            if (at != PAD).any():
                self._row(spec["name"], row, beyond[row], at[at != PAD], values[row, at != PAD])

    def _row(self, output: str, row: int, beyond: bool, positions: Array, got: Array) -> None:
        known = {name: self.scenario.arrays[f"{output}.{name}"] for name in ("row", "beyond", "position", "values", "top", "margin")}
        table = np.flatnonzero((known["row"] == row) & (known["beyond"] == beyond))
        place = np.minimum(np.searchsorted(known["position"][table], positions), len(table) - 1)
        where = table[place]
        if not np.array_equal(known["position"][where], positions):
            raise Failed(f"{self.scenario.name}: the reference says nothing of some positions of row {row}")
        columns, expected = self.scenario.arrays[f"{output}.columns"], known["values"][where]
        chosen = got[:, columns] if len(columns) else got
        if not np.isfinite(got).all():
            self.worst = math.inf
            self.faults.append(f"row {row}, {output}: NaN or infinity")
            return
        sigma = float(self.scenario.arrays[f"{output}.sigmas"][row])
        delta = np.abs(chosen.astype(np.float64) - expected) / sigma
        self.worst, self.total, self.values = max(self.worst, float(delta.max())), self.total + float(delta.sum()), self.values + delta.size
        for i in np.flatnonzero(delta.max(axis=1) > self.limit)[:1]:
            self.faults.append(f"row {row}, position {positions[i]}, {output}: {delta[i].max():.1e} σ off, limit {self.limit:.1e} σ")
        if output == RANKED:
            self._tokens(row, positions, got.argmax(axis=1) == known["top"][where], known["margin"][where] / sigma)

    def _tokens(self, row: int, positions: Array, same: Array, margin: Array) -> None:
        self.tokens, self.agreed = self.tokens + len(same), self.agreed + int(same.sum())
        for i in np.flatnonzero(~same):
            if margin[i] < 2 * self.noise:  # each of the two leaders may have moved by the noise
                self.near_ties.append({"row": row, "position": int(positions[i]), "margin_sigma": float(margin[i])})
            else:
                self.faults.append(f"row {row}, position {positions[i]}: another likeliest token, though it leads by {margin[i]:.1e} σ")

    def result(self) -> dict[str, Any]:
        """Return the scenario's line."""
        mean = self.total / self.values if self.values else None
        if not self.values and not self.faults:
            self.faults.append("no valid position was reached")
        if self.mean_limit and mean is not None and mean > self.mean_limit:
            self.faults.append(f"values are {mean:.1e} σ off in the mean, limit {self.mean_limit:.1e} σ")
        return {
            "name": self.scenario.name,
            "status": "failed" if self.faults else "passed",
            "reason": self.faults[0] if self.faults else "",
            "max_sigma": self.worst if math.isfinite(self.worst) and self.values else None,  # JSON has no infinity
            "mean_sigma": mean,
            "limit": self.limit,
            "tokens_agreed": self.agreed,
            "tokens": self.tokens,
            "near_ties": self.near_ties,
        }


def compare(engine: Engine, artifact: Artifact, scenario: Scenario) -> dict[str, Any]:
    """Return the scenario's line: passed, failed, or not_run with the reason."""
    met, refuse = Comparison(scenario, artifact.noise), scenario.about["refuse"]
    if refuse and not refuse.startswith("max_length"):
        return met.result() | {"status": "not_run", "reason": f"forbidden by {refuse}"}
    if not refuse and not fits(engine, scenario):
        return met.result() | {"status": "not_run", "reason": "of sizes that the engine's profiles do not take"}
    pad_id = artifact.config.get("pad_token_id")
    try:
        for index, beyond, outputs in answers(engine, scenario, pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0):
            for spec in () if refuse else artifact.outputs:
                met.add(spec, index, beyond, outputs[spec["name"]], bool(engine.states))
    except Refused as error:
        status = "passed" if refuse else "failed"
        return met.result() | {"status": status, "reason": f"refused: {error}"}
    return met.result() | ({"status": "failed", "reason": f"must be refused ({refuse}), was answered"} if refuse else {})


def fits(engine: Engine, scenario: Scenario) -> bool:
    """Return whether the engine's profiles take the scenario's calls, cut where that is allowed."""
    shapes = [index.shape for index, _, _ in scenario.calls()]
    return all(engine.widest(rows, width) >= (1 if engine.states else width) for rows, width in shapes)


def lengths(engine: Engine, prompt: int, new: int) -> tuple[int, int]:
    """Return how many tokens of prompt and after it one row has room for, as asked or fewer."""
    room = engine.max_length or prompt + new
    new = max(1, min(new, room - 1))
    return engine.widest(1, max(1, min(prompt, room - new))), new


def measure(engine: Engine, tokens: Array, prompt: int, new: int) -> dict[str, float]:
    """Return milliseconds of a prompt and of each token after it, batch 1, greedy; ``step_ms`` without reading logits and choosing."""
    rows = [np.resize(tokens, prompt + new)]

    def call(first: int, width: int, fetch: bool = True) -> tuple[float, int]:
        given = inputs_of(engine, rows, np.arange(first, first + width)[None], np.array([first]), 0)
        begun = time.perf_counter()
        logits = engine(given, fetch).get(RANKED)
        likeliest = int(logits[0, -1].argmax()) if logits is not None else 0
        return 1e3 * (time.perf_counter() - begun), likeliest

    prefills = [call(0, prompt, fetch=False)[0] for _ in range(4)]
    for _ in range(3):  # once as it is, once captured, once replayed
        call(prompt, 1)
    steps = [call(prompt + i, 1, fetch=False)[0] for i in range(new)]
    rows[0][prompt] = call(0, prompt)[1]
    begun = time.perf_counter()
    for i in range(new):
        _, likeliest = call(prompt + i, 1)
        if i + 1 < new:
            rows[0][prompt + i + 1] = likeliest
    each = 1e3 * (time.perf_counter() - begun) / new
    return {
        "prefill_ms": statistics.median(prefills[1:]),
        "decode_ms": each,
        "step_ms": statistics.median(steps),
        "tokens_per_second": 1e3 / each,
    }


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all scenarios' figures as one."""
    worst = [line["max_sigma"] for line in lines if line["max_sigma"] is not None]
    means = [line["mean_sigma"] for line in lines if line["mean_sigma"] is not None]
    counts = {key: sum(line[key] for line in lines) for key in ("tokens_agreed", "tokens")}
    return {"max_sigma": max(worst, default=None), "mean_sigma": statistics.mean(means) if means else None, **counts}


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what was compared and measured, and print it.

    Raises:
        Failed: there is no SDK, no GPU, no plan, or the engine cannot be run.
    """
    trt = load_sdk([asked.sdk] if asked.sdk else SDKS)
    cuda, artifact = Cuda(), Artifact.read()
    plan = asked.engine or FOLDER / artifact.build["engine"]
    if not plan.is_file():
        raise Failed(f"{plan} is not there: run build_engine.py first")
    scenarios = [Scenario.read(path) for path in sorted((FOLDER / "reference").glob("*.npz"))]
    if not scenarios:
        raise Failed(f"{FOLDER / 'reference'} holds nothing to compare with")
    engine = Engine(trt, cuda, plan, artifact.manifest, not asked.no_cuda_graph)
    prompt, new = lengths(engine, asked.prompt_tokens, asked.new_tokens) if engine.states else (0, 0)
    sizes = [index.shape for scenario in scenarios if fits(engine, scenario) for index, _, _ in scenario.calls()]
    engine.allocate([*sizes, (1, max(prompt, 1))])
    print(f"{trt.__name__} {trt.__version__} on {cuda.device}: {plan.name}, {plan.stat().st_size / 1e6:.1f} MB")
    lines = []
    for scenario in scenarios:
        lines.append(line := compare(engine, artifact, scenario))
        figures = "" if line["max_sigma"] is None else f"{line['max_sigma']:.1e} σ  {line['tokens_agreed']}/{line['tokens']} tokens"
        print(f"  {line['name']:24} {line['status']:8} {figures:32} {line['reason']}".rstrip())
    result = {"sdk": trt.__name__, "version": trt.__version__, "device": cuda.device, **summary(lines), "scenarios": lines}
    weights = artifact.weight_bytes(plan.stat().st_size)
    if not engine.states or prompt + new > (engine.max_length or prompt + new):
        return result  # nothing decodes, or there is no slot for a step
    return result | rates(engine, asked.bandwidth, weights, scenarios[0].rows[0], prompt, new)


def rates(engine: Engine, bandwidth: float | None, weights: int, tokens: Array, prompt: int, new: int) -> dict[str, Any]:
    """Return how fast the engine decodes, beside what its memory would allow, and print it."""
    engine.reset()
    found = measure(engine, tokens, prompt, new)
    bandwidth = bandwidth or engine.cuda.bandwidth()
    roofline = bandwidth * 1e9 / weights
    percent = 100 * found["tokens_per_second"] / roofline
    print(f"{prompt} tokens of prompt in {found['prefill_ms']:.2f} ms, then {new} at {found['decode_ms']:.3f} ms each, batch 1,")
    print(f"of which the engine takes {found['step_ms']:.3f} ms: {found['tokens_per_second']:.1f} tokens/s,")
    print(f"{percent:.1f} % of the {roofline:.0f} that {bandwidth:.0f} GB/s allow for {weights / 1e6:.1f} MB of weights a step")
    print("decode steps are one CUDA graph" if engine.replays else f"no CUDA graph{': ' * bool(engine.why_no_graph)}{engine.why_no_graph}")
    figures = {"roofline_percent": percent, "bandwidth_gb_s": bandwidth, "weight_bytes": weights}
    return found | figures | {"cuda_graph": engine.replays}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", type=Path, help="the plan; default: what build.json names, beside this script")
    parser.add_argument("--sdk", choices=SDKS, help="default: the first that is installed")
    parser.add_argument("--prompt-tokens", type=above_zero(int), default=128, metavar="N")
    parser.add_argument("--new-tokens", type=above_zero(int), default=128, metavar="N")
    parser.add_argument("--bandwidth", type=above_zero(float), metavar="GB/s", help="of the device's memory; default: measured by copying")
    parser.add_argument("--no-cuda-graph", action="store_true", help="launch every kernel of a decode step by itself")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    asked = parser.parse_args(argv)
    code = 0
    try:
        result = run(asked)
        statuses = {line["status"] for line in result["scenarios"]}
        code = 3 if "failed" in statuses else 0
        if not statuses & {"passed", "failed"}:
            raise Failed("no scenario of reference/ could be run on this engine")
        print("the numbers are those of the eager model" if not code else "the numbers are WRONG")
    except (Failed, OSError, ValueError, KeyError) as error:
        # A KeyError's text is the key alone.
        result = {"error": repr(error) if isinstance(error, KeyError) else str(error), "problems": getattr(error, "problems", [])}
        code = getattr(error, "code", 1)
        print(f"error: {result['error']}", *(f"  {line}" for line in result["problems"]), sep="\n", file=sys.stderr)
    if asked.json:
        print(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main())
