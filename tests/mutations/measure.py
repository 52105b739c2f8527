"""How each mutation is caught: in which scenario first and by how much. ``python -m tests.mutations.measure`` writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calque.validation.compare import Row
from calque.validation.tolerance import tolerance
from tests.mutations import onnx_mutations
from tests.mutations.fused import OF_THE_MASK
from tests.mutations.mutations import LONGROPE, MUTATIONS, Mutation, applicable
from tests.mutations.traced_gate import MODELS, TracedGate, traced_gate

# A fault that is nearer to the limit than this would pass on another machine, or tell nothing.
LEAST_MARGIN = 5.0
PAGE = Path(__file__).parents[2] / "docs" / "mutations.md"

INTRODUCTION = """\
# What the parity gate catches

Written by `python -m tests.mutations.measure`; `tests/mutations` asserts that each fault is caught, at five times the limit or
more.

Each row breaks a converted model in one way, as a converter's bug would, and lets the parity gate judge it. The models are tiny
and random, with attention sharp enough for faults to show. A cell names the first scenario that fails and how far its worst
logit is off, in standard deviations of the logits; `shape` means that a state did not grow as it must. `single-prompt`, which
comes first, is a prompt of 7 tokens and 8 steps over its cache. Honest models of two layers are within {noise:.1e} σ, the limit
is {limit:.1e} σ, and for the three layers of gemma3_text {limit3:.1e} σ.

**Takes** is what a call must have for the fault to show. Where it is not empty, the usual check of an exporter, one forward
of one unpadded prompt over an empty cache, finds nothing wrong: that is so for {hidden} of the {total} mutations.
"""

NOTES = """\
## With every operator joined

The mutations of the graph are applied before the operators are joined as well, for padding `any` and `right`, those that they have on
phi3, gpt_oss and bloom too, and faults of the
joined operators' own arguments (bias, lengths, tables of angles, sinks, scale, soft cap, window) after it: `tests/mutations/test_fused.py`,
most models with `-m slow`.
All are caught at five times the limit, but for those that joining takes out of the model, which stays right: in padding `right` the
{of_the_mask} mutations of the mask, which it has no more; in padding `any`, of a mask without a window, those of anything but padding.

## With keys and values in slots

Faults of a static cache (slots written early, at another row's place or over each other, masks that count from 0 or see too
much, lengths of before the call, states given back wrong) are planted in nine models after `cache_static`: `tests/mutations/test_slots.py`.
All are caught at five times the limit. `kv_lengths` too large is none: what it hides is padding's, and no token reads it.

## With integers for weights

Faults of packed weights are planted in llama, qwen3, gemma2 and gpt2 at 4 bits, and in two of them at 8 bits with zero points: a
zero point off by one or ignored, groups transposed, the scale of the neighbour group or of the row above, one scale of one group
10 % off, halves of bytes swapped, groups swapped, rows one place off, signed for unsigned. So are plans other than the
reference's: the head left out, the search or the calibration left out, another group, one weight left out or of other bits:
`tests/mutations/test_quantized.py`. All are caught at five times the limit, activations being as they are.

## What cannot be caught, and is no fault

- **All positions one further** in a model with rotary embeddings: a rotation common to queries and keys changes no score.
  A test holds that the gate passes it.
- **One element of gpt2's `c_attn.bias`** 1 % off: its largest element belongs to the keys, and what is added to all keys
  alike shifts every score of a query by one number, which softmax takes out again. One element of any *other* parameter of the
  six models, the largest, 1 % off is caught; a test goes through all of them.
- **Epsilon 1e-5 for 1e-6** in gemma: its embeddings times √hidden have unit variance, so the two differ by 3e-5 to 4e-5 σ,
  which is within the limit. The tiny gemmas here have epsilon 1e-4, the fault is the usual 1e-6 (3e-4 to 4e-4 σ).
"""


@dataclass(frozen=True)
class Finding:
    """How one fault of one model was met.

    ``scenario``: the first that fails, empty if none does. ``sigma``: its worst |Δ|, None where it stopped before a number was wrong.
    ``seen_by_one_forward``: whether one forward of one unpadded prompt over an empty cache fails too.
    """

    scenario: str
    sigma: float | None
    reason: str
    seen_by_one_forward: bool = True

    @classmethod
    def of(cls, failed: Row | None, seen_by_one_forward: bool = True) -> Finding:
        if failed is None:
            return cls("", 0.0, "every scenario passed", seen_by_one_forward)
        worst = failed["worst_sigma"]
        # Below the limit, it was no number that failed.
        return cls(failed["name"], worst if worst and worst > failed["limit"] else None, failed["reason"], seen_by_one_forward)

    @property
    def is_shape(self) -> bool:
        """Whether it stopped at a shape, which no number was needed to see."""
        return self.sigma is None and " has shape " in self.reason

    def margin(self, limit: float) -> float:
        """How many times the limit it was off; infinite where there is no number."""
        return float("inf") if self.sigma is None else self.sigma / limit

    def __str__(self) -> str:
        size = f"{self.sigma:.1g} σ" if self.sigma is not None else "shape" if self.is_shape else "crash"
        return f"{self.scenario or 'not caught'}, {size}"


def limit_of(gate: TracedGate) -> float:
    """The |Δ|/σ that the gate allows a model."""
    return tolerance(gate.io.dtype).limit(gate.io.layers)


def find(gate: TracedGate, mutation: Mutation) -> Finding:
    """What the gate says to a mutated copy of its model."""
    session = gate.session(mutation.broken(gate.settled))
    return Finding.of(gate.first_failure(session), gate.one_forward(session)["status"] == "failed")


def find_in_file(gate: TracedGate, edit: onnx_mutations.Edit) -> Finding:
    """What the gate says to a copy of the emitted artifact with the fault in it."""
    made = onnx_mutations.broken(onnx_mutations.artifact(gate.name), edit)
    return Finding.of(gate.first_failure(onnx_mutations.opened(made)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def row_of(mutation: Mutation, names: Sequence[str]) -> list[str]:
    """One mutation's row: what it is, and how each model's gate meets it."""
    cells = [str(find(traced_gate(name), mutation)) if name not in mutation.absent else "–" for name in names]
    return [mutation.name, mutation.says, mutation.takes, *cells]


def file_row(edit: onnx_mutations.Edit) -> list[str]:
    """One row of the emitted file's faults."""
    says = (edit.__doc__ or "").strip()
    return [edit.__name__.replace("_", " "), says, *(str(find_in_file(traced_gate(name), edit)) for name in MODELS)]


def page() -> str:
    """The page, measured now."""
    row = tolerance("float32")
    hidden = sum(bool(mutation.takes) for mutation in MUTATIONS)
    about = INTRODUCTION.format(noise=row.noise(2), limit=row.limit(2), limit3=row.limit(3), hidden=hidden, total=len(MUTATIONS))
    graph = table(["mutation", "what is wrong", "takes", *MODELS], [row_of(mutation, MODELS) for mutation in MUTATIONS])
    longrope = table(["mutation", "what is wrong", "takes", "phi3"], [row_of(mutation, ("phi3",)) for mutation in LONGROPE])
    file = table(["fault", "what is wrong", *MODELS], [file_row(edit) for edit in onnx_mutations.EDITS])
    whys = sorted({(mutation.name, name, why) for mutation in MUTATIONS for name, why in mutation.absent.items()})
    grouped: dict[tuple[str, str], list[str]] = {}
    for mutation, name, why in whys:
        grouped.setdefault((mutation, why), []).append(name)
    absent = "\n".join(f"- {mutation}: {', '.join(names)} ({why})" for (mutation, why), names in grouped.items())
    counts = ", ".join(f"{name} {len(applicable(name))}" for name in MODELS)
    return "\n".join(
        (
            about,
            f"## In the graph\n\nMutations that apply: {counts}.\n\n{graph}",
            f"## Longrope, whose frequencies change at a length\n\n{longrope}",
            f"## In the emitted ONNX file, in standard operators, run by ONNX Runtime\n\n{file}",
            f"## Where a mutation does not apply\n\n{absent}\n",
            NOTES.format(of_the_mask=len(OF_THE_MASK)),
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors this small are slower on several
    PAGE.write_text(page(), encoding="utf-8")
