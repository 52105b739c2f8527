"""Medians, ranges and ratios of the runs, and the Markdown that shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TITLE = "Decoding side by side"
_LOOP = """\
Every artifact is in a process of its own with {threads} threads. Those of Calque, genai's builder and optimum-onnx run in one loop on the
ONNX Runtime named first under versions; OpenVINO's runs in its own infer request, llama.cpp's through its own C interface, both in the
same loop around them. A round is one run of every artifact on every prompt, one artifact after another, beginning with a different one
each time; a run is a prompt of seeded tokens without padding and {steps} greedy steps of one token."""
_FP32 = """\
Weights, cache and arithmetic are fp32: OpenVINO is told so, as it would take bf16 where the processor has it and an 8-bit cache, and so is
llama.cpp, whose cache would be fp16 and whose flash attention works in half precision as well. *As it comes*, it has both: that row is not
fp32."""
_INTEGERS = """\
Weights are of {bits} bits, what products read is rounded to 8 wherever a runtime's best kernel wants it, and caches are what each tool
makes by default: float32 in the ONNX graphs, 8 bits in OpenVINO, fp16 in llama.cpp. Each tool has its best options, shown under the
commands. Calque *all* has table and head of 4 bits as the peers have; without, they have 8, which is its default."""
_CACHE = """\
The cache goes from the outputs to the inputs without copies; OpenVINO and llama.cpp keep it themselves."""
_ALL_LOGITS = """\
Every ONNX graph and OpenVINO's model give the logits of all positions, llama.cpp of the last one alone, which is less work for a prompt."""
_LAST_LOGITS = """\
Calque's graphs, genai's and llama.cpp give the logits of the last position alone, OpenVINO's model those of all."""
_FIGURES = """\
TTFT is the time to the first token; decode is the tokens per second of the steps after it. Figures are the median of the rounds, with the
range in brackets. Peak RSS is that of the artifact's process from its start, pages of mapped files included. Nodes are those that one step
executes in ONNX Runtime. Disk is the whole folder; Calque's holds the reference of its proof as well. *Same tokens* compares with the
first artifact: from which token on they differ, if they do; with random weights two tokens can be nearly as probable as each other, so
that rounding alone decides. Ratios are the median of the ratios within each round, turned so that above 1 the artifact of the row is
faster, or takes less. The rate at which the machine reads memory bounds decoding; it is measured before every run, and where its range is
wide, something else ran meanwhile."""


def _notes(precision: str, logits: str) -> str:
    return "\n".join((_LOOP, precision, _CACHE, logits, _FIGURES))


NOTES = {
    "fp32": _notes(_FP32, _ALL_LOGITS),
    "int8": _notes(_INTEGERS.format(bits=8), _LAST_LOGITS),
    "int4": _notes(_INTEGERS.format(bits=4), _LAST_LOGITS),
}


@dataclass(frozen=True)
class Run:
    """One run of one artifact; ``differs`` is the first token that is not the first artifact's, None where all are.

    ``bandwidth`` is the bytes per second at which memory was read just before.
    """

    artifact: str
    round: int
    prompt: int
    ttft_s: float
    decode_tokens_per_s: float
    differs: int | None
    bandwidth: float


@dataclass(frozen=True)
class Artifact:
    """What is measured once of an artifact; ``nodes_per_step`` of those that ONNX Runtime runs."""

    name: str
    nodes_per_step: int | None
    output_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class Measured:
    """One shape: its artifacts in the order of the tables, every run, and what those said that failed.

    ``together`` says whether all were loaded at the same time.
    """

    artifacts: tuple[Artifact, ...]
    runs: tuple[Run, ...]
    together: bool
    failed: Mapping[str, str]

    @property
    def prompts(self) -> list[int]:
        """Return the lengths of the prompts."""
        return sorted({run.prompt for run in self.runs})

    def values(self, artifact: str, prompt: int, part: Callable[[Run], float]) -> list[float]:
        """Return one figure of every run of an artifact on a prompt, in the order of the rounds."""
        return [part(run) for run in self.runs if (run.artifact, run.prompt) == (artifact, prompt)]

    def as_json(self) -> dict[str, Any]:
        """Return what results.json holds of the shape."""
        return {**asdict(self), "medians": [self._medians(artifact.name) for artifact in self.artifacts]}

    def _medians(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"artifact": name}
        for prompt in self.prompts:
            for key, part in (("ttft_s", ttft), ("decode_tokens_per_s", speed)):
                found[f"{key}_{prompt}"] = statistics.median(self.values(name, prompt, part))
        return found


def ttft(run: Run) -> float:
    """Return the seconds to the first token."""
    return run.ttft_s


def speed(run: Run) -> float:
    """Return the tokens per second after it."""
    return run.decode_tokens_per_s


def first_difference(tokens: Sequence[int], expected: Sequence[int]) -> int | None:
    """Return the index of the first token that is not the expected one; None where all are."""
    return next((index for index, (one, other) in enumerate(zip(tokens, expected, strict=True)) if one != other), None)


def figures(measured: Measured) -> str:
    """Return the table of figures, and below it the rate at which memory was read and who failed."""
    prompts = measured.prompts
    heads = [f"TTFT {prompt} ms" for prompt in prompts] + [f"decode after {prompt} tok/s" for prompt in prompts]
    lines = _head("", [*heads, "peak RSS MB", "nodes", "disk MB", "same tokens"])
    for artifact in measured.artifacts:
        cells = [_spread([1e3 * value for value in measured.values(artifact.name, prompt, ttft)]) for prompt in prompts]
        cells += [_spread(measured.values(artifact.name, prompt, speed)) for prompt in prompts]
        cells += [f"{artifact.peak_rss_bytes / 1e6:,.0f}", str(artifact.nodes_per_step or "–"), f"{artifact.output_bytes / 1e6:,.1f}"]
        lines.append(_line(artifact.name, [*cells, _same(measured, artifact.name)]))
    rates = [run.bandwidth / 1e9 for run in measured.runs]
    loaded = (
        "All were loaded at the same time." if measured.together else "Together they do not fit into memory: each was loaded for its turn."
    )
    lines += ["", f"Memory was read at {_spread(rates)} GB/s before the runs. {loaded}"]
    if measured.failed:
        lines += ["", *(f"- {name}: {message}" for name, message in measured.failed.items())]
    return "\n".join(lines)


def ratios(measured: Measured, bases: Sequence[str]) -> str:
    """Return the table of every artifact against those of the bases, above 1 where it is faster or takes less.

    Names of bases begin the names of their artifacts.
    """
    prompts = measured.prompts
    heads = [f"TTFT {prompt}" for prompt in prompts] + [f"decode after {prompt}" for prompt in prompts]
    lines = _head("against", [*heads, "peak RSS", "nodes", "disk"])
    peers = [artifact for artifact in measured.artifacts if artifact.name.startswith(tuple(bases))]
    for base in peers:
        for one in measured.artifacts:
            if one in peers:
                continue
            cells: list[float | None] = [_paired(measured, base.name, one.name, prompt, ttft) for prompt in prompts]
            cells += [_paired(measured, one.name, base.name, prompt, speed) for prompt in prompts]
            cells += [
                base.peak_rss_bytes / one.peak_rss_bytes,
                base.nodes_per_step / one.nodes_per_step if base.nodes_per_step and one.nodes_per_step else None,
                base.output_bytes / one.output_bytes,
            ]
            lines.append(_line(f"{one.name} against {base.name}", ["–" if cell is None else f"{cell:.2f}" for cell in cells]))
    return "\n".join(lines)


def _paired(measured: Measured, above: str, below: str, prompt: int, part: Callable[[Run], float]) -> float:
    """Return the median of the ratios within each round: a slow minute meets both."""
    pairs = zip(measured.values(above, prompt, part), measured.values(below, prompt, part), strict=True)
    return statistics.median(one / other for one, other in pairs)


def _same(measured: Measured, name: str) -> str:
    found: dict[int, int] = {}
    for run in measured.runs:
        if run.artifact == name and run.differs is not None:
            found[run.prompt] = min(run.differs, found.get(run.prompt, run.differs))
    return ", ".join(f"from token {index} after {prompt}" for prompt, index in sorted(found.items())) or "yes"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def _head(first: str, names: Sequence[str]) -> list[str]:
    return [_line(first, names), _line("---", ["--:"] * len(names))]


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join((first, *cells))} |"
