"""A program of MIL written as a ``.mlpackage``: the same bytes for the same program, and its integers read back.

::

    model.mlpackage/Manifest.json                               what is where; its identifiers come from the names, not from chance
    model.mlpackage/Data/com.apple.CoreML/model.mlmodel         the functions
    model.mlpackage/Data/com.apple.CoreML/weights/weight.bin    constants of 10 values and more, once for all functions

Of coremltools' passes those run that change no value: what stands in the graph is what is saved.
Source: coremltools/converters/mil/converter.py and converters/mil/backend/mil/load.py of coremltools@9.0.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Function

    from calque.traced import TracedModel

PACKAGE = "model.mlpackage"
DATA = "Data/com.apple.CoreML"
AUTHOR = "com.apple.CoreML"
# Key in the package's metadata: the parameter of each constexpr.
INTEGERS = "calque.integers"
PASSES = (
    "common::const_elimination",  # what follows from constants
    "common::dead_code_elimination",
    "mil_backend::sanitize_name_strings",
    "common::dedup_op_and_var_names",
    "nn_backend::handle_unused_inputs",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' notes on versions of packages that it was not tested with, and on types, off the user's terminal."""
    logger = logging.getLogger("coremltools")
    level, before = logger.level, logging.root.manager.disable
    logging.disable(logging.WARNING)  # its own logger gets a level and a handler when it is imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logger.setLevel(level)


def program(model: TracedModel, functions: dict[str, Function]) -> Any:
    """Return the functions as one program, cleaned."""
    from coremltools.converters.mil.mil import Program
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    made = Program()
    for name, function in functions.items():
        made.add_function(name, function)
    made.default_function_name = next(iter(functions))
    made.export_as_multifunction = len(functions) > 1
    for name in PASSES:
        PASS_REGISTRY[name](made)
    return made


def write(made: Any, package: Path, integers: dict[str, str]) -> None:
    """Leave the program at ``package``."""
    from coremltools.converters.mil.backend.mil.load import load

    data = package / DATA
    (data / "weights").mkdir(parents=True)
    with quiet():
        model = load(made, str(data / "weights"), specification_version=9, convert_to="mlprogram", convert_from="milinternal")
    if integers:
        model.description.metadata.userDefined[INTEGERS] = json.dumps(integers, sort_keys=True)
    (data / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    (package / "Manifest.json").write_text(json.dumps(_manifest(package.name), indent=4) + "\n", encoding="utf-8")


def _manifest(name: str) -> dict[str, Any]:
    """Return what Manifest.json says; its identifiers are the same in each package of a name."""
    model, weights = (str(uuid5(NAMESPACE_URL, f"calque:{name}/{part}")).upper() for part in ("model.mlmodel", "weights"))

    def entry(part: str, description: str) -> dict[str, str]:
        return {"author": AUTHOR, "description": description, "name": part, "path": f"{AUTHOR}/{part}"}

    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {weights: entry("weights", "CoreML Model Weights"), model: entry("model.mlmodel", "CoreML Model Specification")},
        "rootModelIdentifier": model,
    }


def operators(made: Any) -> Sequence[str]:
    """Return the operators that a program has, constants left out."""
    return sorted({op.op_type for function in made.functions.values() for op in function.operations if op.op_type != "const"})
