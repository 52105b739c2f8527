from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calque.errors import ArtifactUnreadable, UsageError
from calque.runtime.mil import MilProgram, uncovered
from calque.runtime.mil_file import MilFile, Stored, TensorType, read_blob
from tests.runtime.mil_packages import ct, f16, f32, i8, i16, i32, package, u8, unwarned

X = f32([[1, 2, 3]])
WEIGHT = np.arange(600, dtype=np.float32).reshape(200, 3)
RANGES = {"uint1": (0, 2), "uint2": (0, 4), "uint3": (0, 8), "uint4": (0, 16), "uint6": (0, 64), "int4": (-8, 8)}
RANGES |= {"uint8": (0, 256), "int8": (-128, 128), "uint16": (0, 9999), "int16": (-999, 999), "int32": (-(2**31), 2**31 - 1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mil") / "whole.mlpackage"
    return package(path, {"y": lambda mb, x: mb.linear(x=x, weight=WEIGHT)}, X)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy.mlpackage"))


@pytest.mark.parametrize("element", [*RANGES, "float16", "float32"])
def test_weights_are_read_as_coremltools_writes_them(tmp_path: Path, element: str) -> None:
    from coremltools.libmilstoragepython import _BlobStorageWriter

    generator = np.random.default_rng(0)
    kind = TensorType(element, (37,))
    if element in RANGES:
        written: Any = generator.integers(*RANGES[element], 37).astype(kind.dtype)
        places = [getattr(_BlobStorageWriter(str(tmp_path / "w.bin")), f"write_{element}_data")(written)]
    else:
        written = generator.standard_normal(37).astype(kind.dtype)
        writer = _BlobStorageWriter(str(tmp_path / "w.bin"))
        write = writer.write_float_data if element == "float32" else lambda value: writer.write_fp16_data(value.view(np.uint16))
        places = [write(written)]
        del writer, write
    data = memoryview((tmp_path / "w.bin").read_bytes())
    found = read_blob(data, places[0], kind, "w.bin")
    assert found.dtype == kind.dtype
    np.testing.assert_array_equal(found, written)
    with pytest.raises(ArtifactUnreadable, match=r"w.bin holds no .* at 64"):
        read_blob(data, places[0], TensorType("uint32", (37,)), "w.bin")


def test_operators_and_types_are_read(whole: Path) -> None:
    function = MilFile.read(whole).function("main")
    assert function.opset == "CoreML8"
    assert function.block.inputs == (("x", TensorType("float32", (1, 3))),)
    assert function.block.outputs == ("y_0",)
    linear = next(operation for operation in function.block.operations if operation.type == "linear")
    assert set(linear.inputs) == {"x", "weight", "bias"}
    weight = next(one for one in function.block.operations if one.name == linear.inputs["weight"][0].name).attributes["val"]
    assert isinstance(weight, Stored)
    np.testing.assert_array_equal(weight.load(), WEIGHT)


def test_immediate_values_of_every_type_are_read(tmp_path: Path) -> None:
    values = {
        "i": i32([-1, 2**31 - 1]),
        "f": f32([1.5, -np.inf]),
        "h": f16([65504, -0.5]),
        "c": i8([-128, 127]),
        "u": u8([0, 255]),
        "s": i16([-5, 300]),
        "b": np.array([True, False]),
    }
    cases = {name: lambda mb, x, value=value: mb.identity(x=mb.const(val=value)) for name, value in values.items()}
    block = MilFile.read(package(tmp_path / "p.mlpackage", cases, X)).function("main").block
    found = [one.attributes["val"] for one in block.operations if one.type == "const" and not isinstance(one.attributes["val"], str)]
    for value in values.values():
        assert any(getattr(one, "dtype", None) == value.dtype and np.array_equal(one, value) for one in found), value


def test_a_function_that_is_not_there_is_refused(whole: Path) -> None:
    with pytest.raises(UsageError, match="has no function prefill") as raised:
        MilFile.read(whole).function("prefill")
    assert raised.value.where == ("main",)


def test_a_missing_package_is_unreadable(tmp_path: Path) -> None:
    for call in (MilProgram, uncovered):
        with pytest.raises(ArtifactUnreadable, match="cannot be read as a Core ML package"):
            call(tmp_path / "none.mlpackage")


@pytest.mark.parametrize("kept", [0, 64, 100, 2000])
def test_truncated_weights_are_unreadable(copied: Path, kept: int) -> None:
    weights = copied / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ArtifactUnreadable, match=r"weight.bin (is truncated|cannot be read)"):
        MilProgram(copied)


def test_missing_weights_are_unreadable(copied: Path) -> None:
    (copied / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").unlink()
    with pytest.raises(ArtifactUnreadable, match=r"weight.bin cannot be read"):
        MilProgram(copied)


def test_a_damaged_program_is_unreadable_wherever_it_ends(copied: Path) -> None:
    model = copied / "Data" / "com.apple.CoreML" / "model.mlmodel"
    data = model.read_bytes()
    for kept in range(0, len(data), 97):
        model.write_bytes(data[:kept])
        with pytest.raises(ArtifactUnreadable, match="cannot be read as a Core ML package"):
            MilProgram(copied)


def test_a_model_of_another_kind_is_unreadable(copied: Path) -> None:
    (copied / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(b"\x08\x09")
    with pytest.raises(ArtifactUnreadable, match="holds no program of MIL"):
        MilFile.read(copied)


def test_nothing_outside_of_the_package_is_read(copied: Path) -> None:
    manifest = copied / "Manifest.json"
    described = json.loads(manifest.read_text())
    described["itemInfoEntries"][described["rootModelIdentifier"]]["path"] = "../../other.mlmodel"
    manifest.write_text(json.dumps(described))
    with pytest.raises(ArtifactUnreadable, match="is outside of it"):
        MilFile.read(copied)


def test_weights_outside_of_the_package_are_not_read(copied: Path) -> None:
    model = copied / "Data" / "com.apple.CoreML" / "model.mlmodel"
    name = b"@model_path/weights/weight.bin"
    data = model.read_bytes()
    assert name in data
    model.write_bytes(data.replace(name, b"@model_path/../../../../ab.bin"))
    with pytest.raises(ArtifactUnreadable, match="are outside of it"):
        MilFile.read(copied)


def test_bounds_of_inputs_are_read(tmp_path: Path) -> None:
    from coremltools.converters.mil import Builder as mb

    specs = [mb.TensorSpec(shape=(1, ct.RangeDim(2, 5).symbol))]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return mb.relu(x=x, name="y")

    for name, shape in {"range": ct.Shape((1, ct.RangeDim(2, 5))), "list": ct.EnumeratedShapes([(1, 2), (1, 4)])}.items():
        with unwarned():
            ct.convert(
                program,
                convert_to="mlprogram",
                inputs=[ct.TensorType("x", shape=shape)],
                minimum_deployment_target=ct.target.iOS18,
                skip_model_load=True,
                package_dir=str(tmp_path / f"{name}.mlpackage"),
            )
    opened = MilProgram(tmp_path / "range.mlpackage")
    assert opened.inputs == {"x": ((1, None), np.dtype("float32"))}
    assert opened({"x": f32([[-1, 1]])})["y"].tolist() == [[0, 1]]
    for length in (1, 6):
        with pytest.raises(UsageError, match="outside of"):
            opened({"x": np.zeros((1, length), np.float32)})
    listed = MilProgram(tmp_path / "list.mlpackage")
    assert listed({"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 4)
    with pytest.raises(UsageError, match="none of"):
        listed({"x": np.zeros((1, 3), np.float32)})
