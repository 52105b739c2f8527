"""A program of MIL written as a ``.mlpackage``: the same bytes for the same program, and its integers read back.

::

    model.mlpackage/Manifest.json                               what is where; its identifiers come from the names, not from chance
    model.mlpackage/Data/com.apple.CoreML/model.mlmodel         the functions
    model.mlpackage/Data/com.apple.CoreML/weights/weight.bin    constants of 10 values and more, once for all functions

Of coremltools' passes those run that change no value: what stands in the graph is what is saved.
Source: coremltools/converters/mil/converter.py and converters/mil/backend/mil/load.py of coremltools@9.0.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from calque.errors import Unsupported, WontFit
from calque.runtime.mil_file import MilFile, Named, Stored

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Function


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
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # its own logger gets its level and a handler only when it is imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def fresh_names() -> None:
    """Operators are numbered from 0 again: names of one program do not depend on those before it."""
    from coremltools.converters.mil.mil import Builder

    Builder.name_count.clear()


def program(functions: dict[str, Function]) -> Any:
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
    for function in functions.values():
        _share_constants(function)
    try:
        made._check_early_error_out_for_invalid_program()  # as coremltools' own conversion asks
    except ValueError as error:
        raise Unsupported("Core ML cannot say the graph", [str(error)], "use a model without it") from error
    return made


def _share_constants(function: Function) -> None:
    """Give constants that are no weights names of their values, by which those of several functions are written once."""
    for op in function.operations:
        if op.op_type == "const" and op.weight_id is None and isinstance(op.outputs[0].val, np.ndarray):
            value = np.ascontiguousarray(op.outputs[0].val)
            op.weight_id = f"{op.outputs[0].dtype.__name__}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"


def write(made: Any, package: Path, integers: dict[str, str]) -> None:
    """Leave the program at ``package``."""
    from coremltools.converters.mil.backend.mil.load import load

    data = package / DATA
    (data / "weights").mkdir(parents=True)
    with quiet(), _told_of_disk(package):
        model = load(made, str(data / "weights"), specification_version=9, convert_to="mlprogram", convert_from="milinternal")
    for description in (model.description, *model.description.functions):
        _bound_all(description.input)
    if integers:
        model.description.metadata.userDefined[INTEGERS] = json.dumps(integers, sort_keys=True)
    (data / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    (package / "Manifest.json").write_text(json.dumps(_manifest(package.name), indent=4) + "\n", encoding="utf-8")


@contextmanager
def _told_of_disk(package: Path) -> Iterator[None]:
    """Give it as WontFit that a file cannot grow, of which coremltools says no more than that something is unknown."""
    try:
        yield
    except RuntimeError as error:
        if "writing data to the file" not in str(error):
            raise
        fix = "free some space, or lift the limit of file sizes (ulimit -f)"
        raise WontFit(f"{package.name} cannot be written: {error}", fix=fix) from error


def _bound_all(inputs: Any) -> None:
    """Give inputs of a fixed shape bounds too, where others have some.

    Beside states Core ML takes a fixed shape for one of a list, and refuses both kinds in a model: EnumeratedWithRangeInputsException.
    Source: https://github.com/apple/coremltools/issues/2548, seen there on macOS; not run here.
    """
    arrays = [feature.type.multiArrayType for feature in inputs]
    if any(array.HasField("shapeRange") for array in arrays):
        for array in arrays:
            for size in () if array.HasField("shapeRange") else tuple(array.shape):
                array.shapeRange.sizeRanges.add(lowerBound=size, upperBound=size)


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


def require_once(package: Path) -> None:
    """Leave quietly unless more than a twentieth of the weights' file is what stands there already.

    Raises:
        AssertionError: functions do not share their weights, or one weight is several constants.
    """
    found = {value.place: value for value in _stored(package)}
    seen, doubled, whole = set[bytes](), 0, 0
    for value in found.values():
        array = value.load()
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
        doubled += array.nbytes if digest in seen else 0
        whole += array.nbytes
        seen.add(digest)
    if doubled * 20 > whole:
        raise AssertionError(f"{doubled} of {whole} bytes of weights in {package.name} are there twice")


def _stored(package: Path) -> Iterator[Stored]:
    """Yield every constant that stands in the file of weights."""
    for function in MilFile.read(package).functions.values():
        for operation in function.block.operations:
            values = [*operation.attributes.values(), *(value for parts in operation.inputs.values() for value in parts)]
            yield from (value for value in values if isinstance(value, Stored))


def integers(package: Path) -> dict[str, tuple[Any, Any]]:
    """Return q, int8 [out, in], and scale [out, groups] of every weight that the package holds as integers, by the parameter's name."""
    with quiet():
        from coremltools.proto import Model_pb2

    model = Model_pb2.Model.FromString((package / DATA / "model.mlmodel").read_bytes())
    names = json.loads(model.description.metadata.userDefined.get(INTEGERS, "{}"))
    function = next(iter(MilFile.read(package).functions.values()))
    made = {operation.outputs[0][0]: operation for operation in function.block.operations if operation.outputs}
    found = {}
    for output, parameter in names.items():
        parts = {name: value for name, (value, *_) in made[output].inputs.items()}
        held, scale = parts["data"], _loaded(parts["scale"])
        if isinstance(held, Named):  # of a table of all levels
            places = made[held.name].inputs
            q = _loaded(places["lut"][0]).reshape(-1)[_loaded(places["indices"][0])]
        else:
            q = _loaded(held)
        found[parameter] = (np.array(q, np.int8), np.array(scale))
    return found


def _loaded(value: Any) -> Any:
    return value.load() if isinstance(value, Stored) else value
