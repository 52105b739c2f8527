"""What products are given while a model reads text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from calque.errors import UsageError
from calque.tokenizer import FILE
from calque.traced import TracedModel

aten = torch.ops.aten
# Where a product has what it is given, and its weight.
PLACES: dict[Any, tuple[int, int]] = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
}


# Tokens of one row.
LENGTH = 256


def read_samples(text: Path, folder: Path, count: int) -> tuple[tuple[int, ...], ...]:
    """Return the first ``count`` rows of a text's tokens, by the tokenizer in ``folder``.

    Raises:
        UsageError: the text cannot be read, or the folder has no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"the text of the calibration cannot be read: {error}", fix="name a file of UTF-8 text") from error
    if not (folder / FILE).is_file():
        raise UsageError(f"{folder} has no {FILE}, so that text cannot be read for calibration", fix="calibrate a model with a tokenizer")
    ids = Tokenizer.from_file(str(folder / FILE)).encode(words, add_special_tokens=False).ids
    return tuple(tuple(ids[start : start + LENGTH]) for start in range(0, len(ids), LENGTH))[:count]


def observe(model: TracedModel, rows: Sequence[Sequence[int]], observer: Callable[[str, Tensor], None]) -> None:
    """``observer`` has been called with the name of each product's weight and what it multiplies, for every row of tokens."""
    from calque.traced_session import TracedSession

    session = TracedSession(model)
    names = {node: name for name, node in model.parameters().items()}

    class Watched(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n.target in PLACES and (weight := n.args[PLACES[n.target][1]]) in names:
                observer(names[weight], self.env[n.args[PLACES[n.target][0]]])  # type: ignore[index]
            return super().run_node(n)

    for row in rows:
        with torch.no_grad():
            Watched(model.module).run(*session.bound, *_inputs(model, row))


def _inputs(model: TracedModel, row: Sequence[int]) -> list[Tensor]:
    """Return the inputs of one row alone, its states empty."""
    ids = torch.tensor([list(row)])
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(len(row))[None]}
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    empty = {
        spec.name: torch.zeros([size if isinstance(size, int) else sizes.get(size, 0) for size in spec.shape])
        for spec in model.inputs
        if spec.name not in known
    }
    return [{**known, **empty}[spec.name] for spec in model.inputs]
