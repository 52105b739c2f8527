from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calque.runtime.mil import MilProgram
from calque.runtime.mil_file import MilFile
from calque.runtime.mil_weights import (
    blockwise_shift_scale,
    lut_to_dense,
    lut_to_sparse,
    sparse_blockwise_shift_scale,
    sparse_to_dense,
)
from tests.runtime.mil_packages import assert_close, ct, f16, f32, i8, package, results, u8, u32, unwarned

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((1, 64)).astype(np.float32)
WEIGHT = GENERATOR.standard_normal((48, 64)).astype(np.float32)


def test_each_block_has_its_own_scale_and_offset() -> None:
    data = i8([[1, 2, 3, 4], [-8, 7, 0, 1]])
    scale, offset = f16([[0.5, 2], [1, 0.25]]), i8([[1, 0], [-1, 1]])
    assert blockwise_shift_scale(data, scale, offset).tolist() == [[0, 0.5, 6, 8], [-7, 8, -0.25, 0]]
    assert blockwise_shift_scale(data, scale).tolist() == [[0.5, 1, 6, 8], [-8, 7, 0, 0.25]]
    with pytest.raises(ValueError, match="3 blocks of an axis of 4"):
        blockwise_shift_scale(data, np.ones((2, 3), np.float16))


def test_tables_are_looked_up_as_in_the_documentation() -> None:
    indices = u8([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3]).reshape(6, 2)
    lut = f16([1, 5, 9, 13, 2, 10, 18, 26]).reshape(2, 1, 4, 1)
    assert lut_to_dense(indices, lut).tolist() == [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]
    vectors = i8([1, 2, 3, 4, 5, 6]).reshape(1, 1, 1, 2, 3)
    places = u8([[[0, 0], [1, 0]], [[1, 1], [0, 0]]])
    along_rows = lut_to_dense(places, vectors, vector_axis=np.int32(1))
    assert along_rows[0].tolist() == [[1, 1], [2, 2], [3, 3], [4, 1], [5, 2], [6, 3]]
    along_columns = lut_to_dense(places, vectors, vector_axis=np.int32(2))
    assert along_columns[0].tolist() == [[1, 2, 3, 1, 2, 3], [4, 5, 6, 1, 2, 3]]


def test_sparse_tables_are_looked_up_as_in_the_documentation() -> None:
    mask = u8([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]])
    indices = u8([0, 1, 1, 0, 1, 1, 0, 0, 1])
    same, values = lut_to_sparse(mask, indices, f16([2, 3]).reshape(1, 1, 2, 1))
    assert same is mask
    assert values.tolist() == [2, 3, 3, 2, 3, 3, 2, 2, 3]
    longer, values = lut_to_sparse(mask, indices, f16([[2, 2], [3, 3]]).reshape(1, 1, 2, 2), np.int32(0))
    assert longer.tolist() == np.repeat(mask, 2, 0).tolist()
    assert sparse_to_dense(values, longer)[4].tolist() == [0, 3, 2, 0, 2, 0]
    mask, data = u8([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]), i8([10, 11, 3, 4, 5, 6, 7, 8, 9])
    _, scaled = sparse_blockwise_shift_scale(mask, data, f32([[0.1, 0.2, 0.3, 0.4]]), i8([[1, 2, 3, 4]]))
    assert_close(scaled, [0.9, 1.8, 0.2, 0.4, 0.6, 0.9, 1.2, 0.7, 1.4])


def test_operators_of_ios_16_hold_bits_in_bytes(tmp_path: Path) -> None:
    quantized = GENERATOR.integers(0, 256, (3, 4)).astype(np.uint8)
    zero, scale = u8([100, 120, 140, 160]), f32([0.5, 0.25, 2, 1])
    cases = {
        "affine": lambda mb, x: mb.add(
            x=x, y=mb.constexpr_affine_dequantize(quantized_data=quantized, zero_point=zero, scale=scale, axis=1)
        ),
        # i0 to i3 are in the first byte from its lowest bits on, i4 is in the second.
        "lut": lambda mb, x: mb.constexpr_lut_to_dense(indices=u8([0b01101100, 0b11]), lut=f32([0, 10, 20, 30]), shape=u32([5])),
        "sparse": lambda mb, x: mb.constexpr_sparse_to_dense(nonzero_data=f32([7, 8]), mask=u8([0b01100]), shape=u32([5])),
    }
    zeros = np.zeros((3, 4), np.float32)
    found = results(package(tmp_path / "p.mlpackage", cases, zeros, target="iOS16"), zeros)
    assert_close(found["affine"][0], (quantized.astype(np.float32) - zero) * scale)
    assert found["lut"][0].tolist() == [0, 30, 20, 10, 30]
    assert found["sparse"][0].tolist() == [0, 0, 7, 8, 0]


def test_activations_are_quantised_to_even_and_clipped(tmp_path: Path) -> None:
    x = f32([[0.25, 0.75, -0.25, 100], [1.5, -100, 0.4, 0.6]])
    cases = {
        "q": lambda mb, x: mb.quantize(input=x, scale=0.5, zero_point=np.int8(3), output_dtype="int8"),
        "d": lambda mb, x: mb.dequantize(input=mb.quantize(input=x, scale=0.5, output_dtype="uint8"), scale=0.5),
        "axis": lambda mb, x: mb.quantize(input=x, scale=f32([0.5, 1]), axis=0, output_dtype="int8"),
    }
    found = results(package(tmp_path / "p.mlpackage", cases, x), x)
    assert found["q"][0].tolist() == [[3, 5, 3, 127], [6, -128, 4, 4]]
    assert found["d"][0].tolist() == [[0, 1, 0, 100], [1.5, 0, 0.5, 0.5]]
    assert found["axis"][0].tolist() == [[0, 2, 0, 127], [2, -100, 0, 1]]


def compressed(path: Path, kind: str) -> Any:
    """Return a model of one product with its weight compressed by coremltools."""
    tools = ct.optimize.coreml
    how = {
        "int8": lambda: tools.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=1),
        "uint8": lambda: tools.OpLinearQuantizerConfig(mode="linear", dtype="uint8", weight_threshold=1),
        "int4": lambda: tools.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32, weight_threshold=1
        ),
        "uint4": lambda: tools.OpLinearQuantizerConfig(
            mode="linear", dtype="uint4", granularity="per_block", block_size=16, weight_threshold=1
        ),
        "palette4": lambda: tools.OpPalettizerConfig(
            mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=16, weight_threshold=1
        ),
        "palette6": lambda: tools.OpPalettizerConfig(mode="uniform", nbits=6, weight_threshold=1),
        "palette3": lambda: tools.OpPalettizerConfig(mode="uniform", nbits=3, weight_threshold=1),
        "palette1": lambda: tools.OpPalettizerConfig(mode="uniform", nbits=1, weight_threshold=1),
        "sparse": lambda: tools.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=1),
    }[kind.removeprefix("sparse_")]()
    config = tools.OptimizationConfig(global_config=how)
    make = tools.linear_quantize_weights if "int" in kind else tools.prune_weights if kind == "sparse" else tools.palettize_weights
    if kind.startswith("sparse_"):
        return make(compressed(path, "sparse"), config, joint_compression=True)
    cases = {"y": lambda mb, x: mb.linear(x=x, weight=WEIGHT)}
    model = ct.models.MLModel(str(package(path / "plain.mlpackage", cases, X)), skip_model_load=True)
    return make(model, config)


@pytest.mark.parametrize(
    ("kind", "operator", "error"),
    [
        ("int8", "constexpr_blockwise_shift_scale", 0.02),
        pytest.param("uint8", "constexpr_blockwise_shift_scale", 0.02, marks=pytest.mark.slow),
        ("int4", "constexpr_blockwise_shift_scale", 0.15),
        ("uint4", "constexpr_blockwise_shift_scale", 0.15),
        ("palette4", "constexpr_lut_to_dense", 0.2),
        pytest.param("palette6", "constexpr_lut_to_dense", 0.1, marks=pytest.mark.slow),
        pytest.param("palette3", "constexpr_lut_to_dense", 0.5, marks=pytest.mark.slow),
        pytest.param("palette1", "constexpr_lut_to_dense", 2.0, marks=pytest.mark.slow),
        pytest.param("sparse", "constexpr_sparse_to_dense", 0.6, marks=pytest.mark.slow),
        ("sparse_int8", "constexpr_sparse_blockwise_shift_scale", 0.6),
        ("sparse_palette4", "constexpr_lut_to_sparse", 0.6),
    ],
)
def test_compressed_weights_equal_what_coremltools_makes_of_them(tmp_path: Path, kind: str, operator: str, error: float) -> None:
    with unwarned():
        model = compressed(tmp_path, kind)
        model.save(str(tmp_path / "small.mlpackage"))
        ct.optimize.coreml.decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
        del model
    block = MilFile.read(tmp_path / "small.mlpackage").function("main").block
    assert operator in {operation.type for operation in block.operations}
    small, dense = (MilProgram(tmp_path / f"{name}.mlpackage")({"x": X})["y_0"] for name in ("small", "dense"))
    assert_close(small, dense)
    exact = X @ WEIGHT.T
    assert 0 < np.linalg.norm(small - exact) / np.linalg.norm(exact) < error
