"""docs/across.md shows docs/across.json: the built-in model as int8 and int4 in every target that holds it, beside each other.

Run this file to convert, compare and write both anew, from the repository root; a test holds page and record equal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

DOCS = Path(__file__).parent
MODEL = "builtin:quill"
SLOTS = 64
TARGETS = ("onnxruntime", "torchscript", "torchscript-lite", "aotinductor", "coreml", "tensorrt")
PRECISIONS = ("int8", "int4")
OPENING = """# The same integers in every target

<!-- Written by docs/across.py from docs/across.json; do not edit. -->

`builtin:quill`, a trained model, as int8 and as int4 in every target that holds it, made by one pass and read back out of the files: *rows*
are outputs of products, *rows apart* those whose integers are not the first target's. Then what the artifacts answer in the scenarios
that all were proved by, every two beside each other, in σ of the output. Runtimes round activations in ways of their own, or not at all,
which is most of what is between them; *without* are the same files told not to round, where their runtime can be told so. TensorRT's
file is run by ONNX Runtime, Core ML's by the interpreter of MIL, both in float16.

```bash
python docs/across.py
calque compare FOLDER FOLDER …   # for any artifacts of one model
```
"""

Record = dict[str, Any]


def measure() -> Record:
    """Return what was found in each precision."""
    import calque
    from calque import targets
    from calque.recipe import Dims, Recipe
    from calque.side_by_side import compare

    found: Record = {}
    with TemporaryDirectory() as place:
        for precision in PRECISIONS:
            folders = []
            for target in TARGETS:
                if precision in targets.load(target).precisions:
                    print(f"{target} {precision}", file=sys.stderr, flush=True)
                    recipe = Recipe(model=MODEL, target=target, precision=precision, dims=Dims(max_length=SLOTS))  # type: ignore[arg-type]
                    folders.append(calque.convert(recipe, Path(place, f"{target}-{precision}")).folder)
            found[precision] = compare(folders)
    return found


def page(found: Record) -> str:
    """Return the page."""
    parts = [OPENING]
    for precision, beside in found.items():
        parts.append(f"## {precision}\n\n{_integers(beside['integers'])}\n")
        parts += [_answers(beside, rounded) for rounded in dict.fromkeys(row["rounded"] for row in beside["answers"])]
    return "\n".join(parts)


def _integers(rows: list[Record]) -> str:
    head = ("target", "matrices", "rows", "rows apart", "scales")
    cells = [(_name(row["artifact"]), row["matrices"], row["rows"], row["rows_apart"] or "none",
              f"{row['scales']} ({row['scale_dtype']})") for row in rows]  # fmt: skip
    return _table(head, cells)


def _answers(beside: Record, rounded: bool) -> str:
    names = [artifact["name"] for artifact in beside["artifacts"]]
    rows = {tuple(row["artifacts"]): row for row in beside["answers"] if row["rounded"] == rounded}
    head = ("as they run" if rounded else "without rounded activations", *map(_name, names[1:]))
    cells = []
    for one in names[:-1]:
        found = [rows.get((one, other)) for other in names[1:]]
        cells.append((_name(one), *("" if row is None else f"{row['worst_sigma']:.0e}, {row['top1']:.3f}" for row in found)))
    positions = next(iter(rows.values()))["positions"]
    return f"{_table(head, cells)}\n\nWorst |Δ|/σ, and the share of {positions} positions with the same likeliest token.\n"


def _name(artifact: str) -> str:
    return artifact.rpartition(" ")[0]


def _table(head: tuple[object, ...], rows: list[tuple[object, ...]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Measure, and write record and page."""
    found = measure()
    (DOCS / "across.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (DOCS / "across.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
