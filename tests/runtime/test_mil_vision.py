from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calque.errors import Unsupported
from calque.runtime.mil_vision import grid
from tests.runtime.mil_packages import assert_close, package, results

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((2, 4, 9, 7)).astype(np.float32)
T = torch.from_numpy(X)
WEIGHT = GENERATOR.standard_normal((6, 4, 3, 2)).astype(np.float32)
DEPTHWISE = GENERATOR.standard_normal((4, 1, 3, 3)).astype(np.float32)
UP = GENERATOR.standard_normal((4, 3, 3, 2)).astype(np.float32)
BIAS = GENERATOR.standard_normal(6).astype(np.float32)
W, D, U, B = (torch.from_numpy(part) for part in (WEIGHT, DEPTHWISE, UP, BIAS))
LINE = X.reshape(2, 36, 7)
NARROW = GENERATOR.standard_normal((5, 36, 3)).astype(np.float32)

CASES: dict[str, tuple[Any, Any]] = {
    "conv": (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT, bias=BIAS, strides=[2, 1], dilations=[2, 3], pad_type="custom", pad=[1, 2, 0, 3]),
        F.conv2d(F.pad(T, (0, 3, 1, 2)), W, B, (2, 1), 0, (2, 3)),
    ),
    "depthwise": (lambda mb, x: mb.conv(x=x, weight=DEPTHWISE, groups=4, pad_type="valid"), F.conv2d(T, D, groups=4)),
    "same": (lambda mb, x: mb.conv(x=x, weight=WEIGHT, pad_type="same"), F.conv2d(F.pad(T, (0, 1, 1, 1)), W)),
    "same_lower": (lambda mb, x: mb.conv(x=x, weight=WEIGHT, pad_type="same_lower"), F.conv2d(F.pad(T, (1, 0, 1, 1)), W)),
    "line": (
        lambda mb, x: mb.conv(x=mb.reshape(x=x, shape=[2, 36, 7]), weight=NARROW, pad_type="custom", pad=[1, 1]),
        F.conv1d(torch.from_numpy(LINE), torch.from_numpy(NARROW), padding=1),
    ),
    "transposed": (
        lambda mb, x: mb.conv_transpose(x=x, weight=UP, bias=BIAS[:3], strides=[2, 3], pad_type="custom", pad=[1, 1, 0, 0]),
        F.conv_transpose2d(T, U, B[:3], (2, 3), (1, 0)),
    ),
    "longer": (
        lambda mb, x: mb.conv_transpose(
            x=x, weight=UP, bias=BIAS[:3], strides=[2, 3], pad_type="custom", pad=[1, 1, 0, 0], output_shape=[2, 3, 18, 22]
        ),
        F.conv_transpose2d(T, U, B[:3], (2, 3), (1, 0), (1, 2)),
    ),
    "max": (
        lambda mb, x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 0]),
        F.max_pool2d(T, (3, 2), 2, (1, 0)),
    ),
    "max_ceil": (
        lambda mb, x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[3, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True),
        F.max_pool2d(T, (3, 2), (3, 2), (1, 1), ceil_mode=True),
    ),
    "average": (
        lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]),
        F.avg_pool2d(T, (3, 2), 2, (1, 1)),
    ),
    "average_inside": (
        lambda mb, x: mb.avg_pool(
            x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], exclude_padding_from_average=True
        ),
        F.avg_pool2d(T, (3, 2), 2, (1, 1), count_include_pad=False),
    ),
    "average_ceil": (
        lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[3, 2], strides=[3, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True),
        F.avg_pool2d(T, (3, 2), (3, 2), (1, 1), ceil_mode=True),
    ),
    "l2": (lambda mb, x: mb.l2_pool(x=x, kernel_sizes=[3, 2], pad_type="valid"), F.avg_pool2d(T * T, (3, 2), 1).mul(6).sqrt()),
    "bilinear": (
        lambda mb, x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False),
        F.interpolate(T, scale_factor=(2, 3), mode="bilinear"),
    ),
    "bilinear_corners": (
        lambda mb, x: mb.resize_bilinear(x=x, target_size_height=13, target_size_width=4, sampling_mode="STRICT_ALIGN_CORNERS"),
        F.interpolate(T, (13, 4), mode="bilinear", align_corners=True),
    ),
    "nearest": (
        lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        F.interpolate(T, scale_factor=(2, 3)),
    ),
    "nearest_to": (lambda mb, x: mb.resize_nearest_neighbor(x=x, target_size_height=18, target_size_width=7), F.interpolate(T, (18, 7))),
    "resize": (
        lambda mb, x: mb.resize(
            x=x, shape=[13, 4], resized_dims=np.uint32(2), interpolation_mode="LINEAR", sampling_mode="UNALIGN_CORNERS"
        ),
        F.interpolate(T, (13, 4), mode="bilinear"),
    ),
}


@pytest.mark.parametrize("type_", [np.float32, np.float16])
def test_operators_of_pictures_equal_pytorch(tmp_path: Path, type_: Any) -> None:
    cases = {name: build for name, (build, _) in CASES.items()}
    if type_ is np.float16:  # weights are then of the same type
        cases = {name: cases[name] for name in ("max", "average_inside", "l2", "bilinear")}
    x = X.astype(type_)
    found = results(package(tmp_path / "p.mlpackage", cases, x), x)
    for name in cases:
        try:
            assert found[name][0].dtype == type_
            assert_close(found[name][0], CASES[name][1], 1e-5 if type_ is np.float32 else 3e-3)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(
    ("mode", "wanted", "expected"),
    [
        ("UNALIGN_CORNERS", 5, [0, 0.1, 0.5, 0.9, 1]),
        ("STRICT_ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("DEFAULT", 5, [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("ALIGN_CORNERS", 1, [0.5]),
        ("DEFAULT", 6, [0, 0.333, 0.667, 1, 1, 1]),
    ],
)
def test_points_of_a_resized_axis_are_those_of_the_documentation(mode: str, wanted: int, expected: list[float]) -> None:
    np.testing.assert_allclose(grid(2, wanted, mode), expected, atol=1e-3)


def test_a_nearest_element_that_is_not_documented_is_refused(tmp_path: Path) -> None:
    cases = {"n": lambda mb, x: mb.resize_nearest_neighbor(x=x, target_size_height=13, target_size_width=7)}
    with pytest.raises(Unsupported, match=r"resize_nearest_neighbor .* has no result"):
        results(package(tmp_path / "p.mlpackage", cases, X), X)
