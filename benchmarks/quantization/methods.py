"""Perplexity of the built-in model with its weights stored in every way there is: what each method keeps of the model.

::

    python -m benchmarks.quantization.methods --text FILE --out FOLDER     writes FOLDER/methods.md
    python -m benchmarks.quantization.methods --write-text FILE            writes the text to calibrate on, and no more

Perplexities are those of the eager model with the weights that the integers stand for, over ``heldout.txt``. What is calibrated on is
documentation of Python's standard library from the side of quill's corpus that quill was trained on: no document of it, and but few
paragraphs, are held out.
"""

from __future__ import annotations

import argparse
import itertools
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.quill.corpus import assemble
from benchmarks.quill.extract import library_documents
from benchmarks.quill.measure import perplexity
from calque import passes
from calque.conversion import Conversion, open_target, resolve
from calque.recipe import Recipe
from calque.validation.eager import with_weights

MODEL = "builtin:quill"
HELD_OUT = "heldout.txt"
METHODS = ("nearest without search", "nearest", "awq", "gptq")
TEXT_BYTES = 600_000


@dataclass(frozen=True)
class Way:
    """One way of storing weights; ``options`` are those of the pass quantize_weights, None: weights as they are."""

    precision: str
    group: str
    form: str
    method: str
    options: dict[str, Any] | None


def ways() -> Iterator[Way]:
    """Yield every row of the table."""
    yield Way("fp32", "", "", "", None)
    for method in METHODS:
        yield Way("int8", "channel", "symmetric", method, {"bits": 8, "group": 0, **_method(method)})
    for group, symmetric, method in itertools.product((32, 64, 128), (True, False), METHODS):
        form = "symmetric" if symmetric else "asymmetric"
        yield Way("int4", str(group), form, method, {"bits": 4, "group": group, "symmetric": symmetric, **_method(method)})


def _method(name: str) -> dict[str, Any]:
    return {"method": "nearest", "search": False} if name == METHODS[0] else {"method": name}


class Measured:
    """The built-in model, traced once, with a text to calibrate on."""

    def __init__(self, text: Path, scratch: Path) -> None:
        recipe = Recipe.of({"model": MODEL, "target": "onnxruntime", "precision": "int4", "calibration": {"text": str(text)}})
        self.source = resolve(recipe, scratch)
        self.traced = Conversion(recipe, open_target(recipe), self.source, scratch).trace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(self.source.folder / "tokenizer.json"))
        held_out = (self.source.folder / HELD_OUT).read_text(encoding="utf-8")
        self.tokens = np.array(tokenizer.encode(held_out), dtype=np.uint16)

    def perplexity(self, way: Way) -> float:
        """Return the perplexity of the model stored one way."""
        model = self.traced.copy()
        if way.options:
            passes.run([passes.load("quantize_weights", way.options)], model)
        network: Any = with_weights(self.source.load_eager(), model.replaced)
        return perplexity(network, [self.tokens])


def standard_library_text() -> str:
    """Return documentation of the running Python's standard library that no held-out document is part of."""
    listed = assemble(library_documents(Path(sysconfig.get_paths()["stdlib"]))).train
    text = "\n\n".join(listed).encode()[:TEXT_BYTES]
    return text.decode("utf-8", errors="ignore")


def table(model: Measured) -> Iterator[str]:
    """Yield the lines of the table, each as soon as it is measured."""
    yield "| precision | group | form | method | perplexity | against fp32 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    first = 0.0
    for way in ways():
        found = model.perplexity(way)
        first = first or found
        yield f"| {way.precision} | {way.group} | {way.form} | {way.method} | {found:.4f} | {100 * (found / first - 1):+.2f} % |"


HEAD = """\
# Perplexity of `builtin:quill` by method

Eager, float32, with the weights that the integers stand for; `heldout.txt`, 29,413 tokens in runs of 1023. Tied embedding and head int8
where the rest is int4. Calibrated on 128 rows of 256 tokens of documentation of Python's standard library, no document of it held out.
Made by `python -m benchmarks.quantization.methods`.

"""


def main() -> None:
    """Print the table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="text to calibrate on; made of the standard library's documentation if left out")
    parser.add_argument("--out", type=Path, help="folder for methods.md")
    parser.add_argument("--threads", type=int, default=1, help="threads to compute with; 1 if left out")
    parser.add_argument("--write-text", type=Path, metavar="FILE", help="write the text to calibrate on, and no more")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.write_text:
        given.write_text.write_text(standard_library_text(), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        text = given.text or Path(folder, "standard-library.txt")
        if not given.text:
            text.write_text(standard_library_text(), encoding="utf-8")
        lines = []
        for line in table(Measured(text, Path(folder))):
            print(line, flush=True)
            lines.append(line)
    if given.out:
        (given.out / "methods.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
