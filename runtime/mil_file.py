"""What a Core ML ``.mlpackage`` holds: its functions, their operators, and its weights, read without Core ML and coremltools.

Source: Model.proto, FeatureTypes.proto and MIL.proto of coremltools@9.0 for the numbers of the fields; MILBlob's
StorageFormat.hpp and BlobDataType.hpp of the same for the file of weights.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.errors import ArtifactUnreadable, UsageError
from calque.runtime.wire import fields, parts, signed, text, varints

if TYPE_CHECKING:
    from numpy.typing import NDArray

Dims = tuple[int | None, ...]
Message = dict[int, list[Any]]

# MIL's DataType: what numpy holds an element in, and the bits a weight file gives it.
TYPES = {1: ("bool", 8), 10: ("float16", 16), 11: ("float32", 32), 12: ("float64", 64)}
TYPES |= {21: ("int8", 8), 22: ("int16", 16), 23: ("int32", 32), 24: ("int64", 64), 25: ("int4", 4)}
TYPES |= {31: ("uint8", 8), 32: ("uint16", 16), 33: ("uint32", 32), 34: ("uint64", 64)}
TYPES |= {35: ("uint4", 4), 36: ("uint2", 2), 37: ("uint1", 1), 38: ("uint6", 6), 39: ("uint3", 3), 2: ("str", 0)}
BLOB_TYPES = {1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1"}
BLOB_TYPES |= {10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32"}
SENTINEL = 0xDEADBEEF
MODEL_FOLDER = "@model_path/"


@dataclass(frozen=True)
class TensorType:
    """The type of a value: its element (``uint4`` as such) and its shape, None where a length is not fixed."""

    element: str
    shape: Dims
    is_state: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return what numpy holds it in: fewer than eight bits stand one a byte."""
        narrow = {"int4": "int8", **dict.fromkeys(("uint1", "uint2", "uint3", "uint4", "uint6"), "uint8")}
        return np.dtype(narrow.get(self.element, self.element))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the shape of what is written down, of which every length is known."""
        return tuple(length or 0 for length in self.shape)

    @property
    def bits(self) -> int:
        """Return the bits that a file gives an element."""
        return next(bits for element, bits in TYPES.values() if element == self.element)


@dataclass(frozen=True)
class Operation:
    """One operator: each parameter is names of values, or values themselves; ``attributes`` are values of its own."""

    type: str
    name: str
    inputs: dict[str, tuple[Any, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    attributes: dict[str, Any]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Block:
    """Operators in the order they run, and the names that come out."""

    inputs: tuple[tuple[str, TensorType], ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Feature:
    """What the package says of an input: bounds of each length, or the shapes that are allowed; or that it is no array."""

    bounds: tuple[tuple[int, int | None], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    is_array: bool = True


@dataclass(frozen=True)
class Function:
    """A function of the package: its block, and its inputs as an app sees them."""

    opset: str
    block: Block
    features: dict[str, Feature]


@dataclass(frozen=True)
class Named:
    """The name of a value where an operator reads it."""

    name: str


@dataclass(frozen=True)
class Stored:
    """A value that stands in a file of weights."""

    data: Callable[[Path], memoryview]
    path: Path
    place: int
    type: TensorType

    def load(self) -> NDArray[Any]:
        """Return it: a view of the file, unpacked where an element has fewer than eight bits.

        Raises:
            ArtifactUnreadable: the file is missing or ends before it does, or holds something else there.
        """
        try:
            data = self.data(self.path)
        except (OSError, ValueError) as error:  # mmap refuses an empty file with a ValueError
            raise ArtifactUnreadable(f"{self.path} cannot be read: {error}", fix="convert the model again") from error
        return read_blob(data, self.place, self.type, str(self.path))


@dataclass
class MilFile:
    """The functions of a package by name."""

    path: Path
    functions: dict[str, Function]
    default: str = "main"

    @classmethod
    def read(cls, path: Path) -> MilFile:
        """Return what the package says; weights stay in their file, mapped, until they are asked for.

        Raises:
            ArtifactUnreadable: it is missing or damaged, or holds no program of MIL.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
            root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            model = path / "Data" / root
            if not model.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"{root} is outside of it")
            return _Reader(model).file(path)
        except ArtifactUnreadable:
            raise
        except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise ArtifactUnreadable(f"{path} cannot be read as a Core ML package: {said}", fix="convert the model again") from error

    def function(self, name: str) -> Function:
        """Return the function of a name.

        Raises:
            UsageError: the package has none of that name.
        """
        if name not in self.functions:
            raise UsageError(f"{self.path} has no function {name}", sorted(self.functions), "name one of these")
        return self.functions[name]


class _Reader:
    """Reads a model file; the files of weights beside it are mapped once each."""

    def __init__(self, model: Path) -> None:
        self.folder = model.parent
        self.data = _mapped(model)
        self.weights = cache(_mapped)

    def file(self, path: Path) -> MilFile:
        model = _message(self.data)
        if 502 not in model:
            raise ValueError("it holds no program of MIL")
        description = _message(model[2][0]) if 2 in model else {}
        described = [_message(part) for part in description.get(20, ())]
        features = {text(part[1][0]): _features(part.get(2, ())) for part in described}
        alone = _features(description.get(1, ()))
        functions = {}
        for entry in parts(model[502][0], 2):
            key, function = _entry(entry)
            functions[key] = self.function(_message(function), features.get(key, alone))
        default = text(description[21][0]) if 21 in description else "main"
        return MilFile(path, functions, default or "main")

    def function(self, function: Message, features: dict[str, Feature]) -> Function:
        opset = text(function[2][0])
        blocks = dict(_entry(entry) for entry in function[3])
        block = self.block(blocks[opset])
        inputs = tuple(_named_type(part) for part in function.get(1, ()))
        return Function(opset, Block(inputs, block.operations, block.outputs), features)

    def block(self, data: memoryview) -> Block:
        block = _message(data)
        inputs = tuple(_named_type(part) for part in block.get(1, ()))
        operations = tuple(self.operation(_message(part)) for part in block.get(3, ()))
        return Block(inputs, operations, tuple(text(name) for name in block.get(2, ())))

    def operation(self, operation: Message) -> Operation:
        kind = text(operation[1][0])
        inputs = dict(_entry(entry) for entry in operation.get(2, ()))
        attributes = {name: self.value(value) for name, value in (_entry(entry) for entry in operation.get(5, ()))}
        outputs = tuple(_named_type(part) for part in operation.get(3, ()))
        name = str(attributes.pop("name", outputs[0][0] if outputs else kind))
        blocks = tuple(self.block(part) for part in operation.get(4, ()))
        arguments = {key: tuple(self.binding(part) for part in parts(value, 1)) for key, value in inputs.items()}
        return Operation(kind, name, arguments, outputs, attributes, blocks)

    def binding(self, data: memoryview) -> Any:
        """Return the name that is bound, or the value."""
        binding = _message(data)
        return Named(text(binding[1][0])) if 1 in binding else self.value(binding[2][0])

    def value(self, data: memoryview) -> Any:
        """Return an array, where one stands in a file, a text, or a list of them."""
        value = _message(data)
        kind = _value_type(value[2][0])
        if 5 in value:
            return self.stored(_message(value[5][0]), kind)
        immediate = _message(value[3][0])
        if 3 in immediate:
            return [self.value(part) for part in parts(immediate[3][0], 1)]
        return _immediate(_message(immediate[1][0]), kind)

    def stored(self, where: Message, kind: TensorType) -> Stored:
        file = text(where[1][0]).removeprefix(MODEL_FOLDER)
        path = self.folder / file
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"the weights {file} are outside of it")
        return Stored(self.weights, path, where.get(2, [0])[0], kind)


def read_blob(data: memoryview, place: int, kind: TensorType, said: str) -> NDArray[Any]:
    """Return the array whose 64 bytes of metadata stand at a place.

    Raises:
        ArtifactUnreadable: the file ends before it does, or holds another type or size there.
    """
    count = math.prod(kind.lengths)
    bits = kind.bits
    fix = "convert the model again"
    if place + 64 > len(data):
        raise ArtifactUnreadable(f"{said} is truncated: {len(data)} bytes, and a weight is said to be at {place}", fix=fix)
    sentinel, element = np.frombuffer(data, "<u4", 2, place).tolist()
    size, start = np.frombuffer(data, "<u8", 2, place + 8).tolist()
    expected = (count * bits + 7) // 8
    if sentinel != SENTINEL or BLOB_TYPES.get(element) != kind.element or size != expected:
        found = f"type {BLOB_TYPES.get(element, element)}, {size} bytes"
        raise ArtifactUnreadable(f"{said} holds no {kind.element} of {expected} bytes at {place}", [found], fix)
    if start + size > len(data):
        raise ArtifactUnreadable(f"{said} is truncated: {len(data)} bytes, and a weight ends at {start + size}", fix=fix)
    if bits < 8:
        return unpacked(np.frombuffer(data, "u1", size, start), bits, count, signed_=kind.element == "int4").reshape(kind.lengths)
    return np.frombuffer(data, kind.dtype.newbyteorder("<"), count, start).reshape(kind.lengths)


def unpacked(packed: NDArray[np.uint8], bits: int, count: int, *, signed_: bool = False) -> NDArray[Any]:
    """Return elements of fewer than eight bits, one a byte; the first begins at the lowest bit, and some go over two bytes."""
    flat = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    values: NDArray[Any] = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if not signed_:
        return values
    return np.where(values >> (bits - 1), values.astype(np.int16) - (1 << bits), values).astype(np.int8)


def _immediate(tensor: Message, kind: TensorType) -> Any:
    """Return the value that stands in the program itself."""
    which, written = next(iter(tensor.items()))
    if which == 4:
        texts = [text(part) for part in _message(written[0]).get(1, ())]
        return texts[0] if kind.shape == () else texts
    held = _message(written[0]).get(1, [])
    if which in (1, 6):
        flat: Any = np.concatenate([np.frombuffer(part, "<f4" if which == 1 else "<f8") for part in held]) if held else np.zeros(0)
    elif which == 7:
        flat = _from_bytes(held[0] if held else memoryview(b""), kind)
    else:
        numbers = [number for part in held for number in ([part] if isinstance(part, int) else varints(part))]
        flat = np.array([signed(number) for number in numbers], dtype=np.int64)
    return flat.astype(kind.dtype).reshape(kind.lengths)


def _from_bytes(data: memoryview, kind: TensorType) -> NDArray[Any]:
    if kind.bits < 8:
        return unpacked(np.frombuffer(data, "u1"), kind.bits, math.prod(kind.lengths), signed_=kind.element == "int4")
    return np.frombuffer(data, kind.dtype.newbyteorder("<"))


def _named_type(data: memoryview) -> tuple[str, TensorType]:
    named = _message(data)
    return text(named[1][0]), _value_type(named[2][0])


def _value_type(data: memoryview) -> TensorType:
    """Return the type of an array; of a list, dictionary or tuple it is called by what it is, and no operator of ours takes it."""
    kind = _message(data)
    if 5 in kind:
        inner = _value_type(_message(kind[5][0])[1][0])
        return TensorType(inner.element, inner.shape, is_state=True)
    if 1 not in kind:
        return TensorType("list", ())
    tensor = _message(kind[1][0])
    shape = []
    for part in tensor.get(3, ()):
        dimension = _message(part)
        shape.append(_message(dimension[1][0]).get(1, [0])[0] if 1 in dimension else None)
    number = tensor.get(1, [0])[0]
    return TensorType(TYPES.get(number, (f"type {number}", 0))[0], tuple(shape))


def _features(described: Any) -> dict[str, Feature]:
    """Return what is said of each input: its allowed shapes, and bounds of lengths, None where there is none above."""
    found = {}
    for part in described:
        feature = _message(part)
        kind = _message(feature[3][0])
        array = _message(kind[5][0]) if 5 in kind else {}
        ranges = [_message(size) for size in parts(array[31][0], 1)] if 31 in array else []
        bounds = [(size.get(1, [0])[0], signed(size.get(2, [0])[0])) for size in ranges]
        shapes = [tuple(_lengths(shape)) for shape in parts(array[21][0], 1)] if 21 in array else []
        known = tuple((low, high if high >= 0 else None) for low, high in bounds)
        found[text(feature[1][0])] = Feature(known, tuple(shapes), 5 in kind)
    return found


def _lengths(shape: memoryview) -> list[int]:
    return [number for part in _message(shape).get(1, ()) for number in ([part] if isinstance(part, int) else varints(part))]


def _message(data: memoryview) -> Message:
    """Return every field of a message by its number, in the order written."""
    found: Message = {}
    for number, value in fields(data):
        found.setdefault(number, []).append(value)
    return found


def _entry(data: memoryview) -> tuple[str, memoryview]:
    """Return key and value of an entry of a map; an empty value is not written."""
    entry = _message(data)
    return text(entry[1][0]) if 1 in entry else "", entry.get(2, [memoryview(b"")])[0]


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:  # the mapping outlives it, and ends with the last view of it
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
