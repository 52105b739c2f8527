from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from calque.runtime.mil_arithmetic import erf
from tests.runtime.mil_packages import assert_close, f16, f32, i32, package, results

GENERATOR = np.random.default_rng(0)
X = (GENERATOR.standard_normal((2, 3, 4, 5)) * 2).astype(np.float32)
Y = (GENERATOR.random((3, 1, 5)) + 0.5).astype(np.float32)
T, TY = torch.from_numpy(X), torch.from_numpy(Y)
SMALL = f32([0.5, 1.5, -0.25])

# Of each operator: how coremltools builds it, and what PyTorch gives.
UNARY: dict[str, tuple[Any, Any]] = {
    "abs": (lambda mb, x: mb.abs(x=x), T.abs()),
    "acos": (lambda mb, x: mb.acos(x=mb.tanh(x=x)), T.tanh().acos()),
    "asin": (lambda mb, x: mb.asin(x=mb.tanh(x=x)), T.tanh().asin()),
    "atan": (lambda mb, x: mb.atan(x=x), T.atan()),
    "atanh": (lambda mb, x: mb.atanh(x=mb.mul(x=mb.tanh(x=x), y=np.float32(0.5))), (T.tanh() / 2).atanh()),
    "ceil": (lambda mb, x: mb.ceil(x=x), T.ceil()),
    "clip": (lambda mb, x: mb.clip(x=x, alpha=-1.0, beta=0.5), T.clamp(-1, 0.5)),
    "cos": (lambda mb, x: mb.cos(x=x), T.cos()),
    "cosh": (lambda mb, x: mb.cosh(x=x), T.cosh()),
    "erf": (lambda mb, x: mb.erf(x=x), T.erf()),
    "exp": (lambda mb, x: mb.exp(x=x), T.exp()),
    "exp2": (lambda mb, x: mb.exp2(x=x), T.exp2()),
    "floor": (lambda mb, x: mb.floor(x=x), T.floor()),
    "inverse": (lambda mb, x: mb.inverse(x=x, epsilon=0.25), 1 / (T + 0.25)),
    "log": (lambda mb, x: mb.log(x=mb.abs(x=x), epsilon=0.25), (T.abs() + 0.25).log()),
    "round": (lambda mb, x: mb.round(x=mb.mul(x=mb.floor(x=x), y=0.5)), (T.floor() / 2).round()),
    "rsqrt": (lambda mb, x: mb.rsqrt(x=mb.square(x=x), epsilon=0.25), (T * T + 0.25).rsqrt()),
    "sign": (lambda mb, x: mb.sign(x=x), T.sign()),
    "sin": (lambda mb, x: mb.sin(x=x), T.sin()),
    "sinh": (lambda mb, x: mb.sinh(x=x), T.sinh()),
    "sqrt": (lambda mb, x: mb.sqrt(x=mb.abs(x=x)), T.abs().sqrt()),
    "square": (lambda mb, x: mb.square(x=x), T * T),
    "tan": (lambda mb, x: mb.tan(x=mb.tanh(x=x)), T.tanh().tan()),
    "tanh": (lambda mb, x: mb.tanh(x=x), T.tanh()),
    "threshold": (lambda mb, x: mb.threshold(x=x, alpha=0.5), T.clamp(min=0.5)),
    "relu": (lambda mb, x: mb.relu(x=x), T.relu()),
    "relu6": (lambda mb, x: mb.relu6(x=mb.mul(x=x, y=3.0)), F.relu6(T * 3)),
    "clamped_relu": (lambda mb, x: mb.clamped_relu(x=x, alpha=0.5, beta=1.0), torch.where(T >= 0, T, T / 2).clamp(max=1)),
    "elu": (lambda mb, x: mb.elu(x=x, alpha=1.5), F.elu(T, 1.5)),
    "gelu_exact": (lambda mb, x: mb.gelu(x=x, mode="EXACT"), F.gelu(T)),
    "gelu_tanh": (lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), F.gelu(T, approximate="tanh")),
    "gelu_sigmoid": (lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), T * torch.sigmoid(1.702 * T)),
    "leaky_relu": (lambda mb, x: mb.leaky_relu(x=x, alpha=0.25), F.leaky_relu(T, 0.25)),
    "linear_activation": (lambda mb, x: mb.linear_activation(x=x, alpha=2.0, beta=1.0), T * 2 + 1),
    "prelu": (lambda mb, x: mb.prelu(x=x, alpha=SMALL), F.prelu(T, torch.from_numpy(SMALL))),
    "scaled_tanh": (lambda mb, x: mb.scaled_tanh(x=x, alpha=2.0, beta=0.5), 2 * (T / 2).tanh()),
    "sigmoid": (lambda mb, x: mb.sigmoid(x=x), T.sigmoid()),
    "sigmoid_hard": (lambda mb, x: mb.sigmoid_hard(x=x, alpha=0.25, beta=0.5), (T / 4 + 0.5).clamp(0, 1)),
    "silu": (lambda mb, x: mb.silu(x=x), F.silu(T)),
    "softmax": (lambda mb, x: mb.softmax(x=x, axis=1), T.softmax(1)),
    "softplus": (lambda mb, x: mb.softplus(x=x), F.softplus(T)),
    "softplus_parametric": (
        lambda mb, x: mb.softplus_parametric(x=x, alpha=SMALL, beta=SMALL),
        torch.from_numpy(SMALL)[:, None, None] * F.softplus(torch.from_numpy(SMALL)[:, None, None] * T),
    ),
    "softsign": (lambda mb, x: mb.softsign(x=x), F.softsign(T)),
    "thresholded_relu": (lambda mb, x: mb.thresholded_relu(x=x, alpha=0.5), torch.where(T >= 0.5, T, 0)),
    "cumsum": (lambda mb, x: mb.cumsum(x=x, axis=-1), T.cumsum(-1)),
    "cumsum_exclusive": (lambda mb, x: mb.cumsum(x=x, axis=1, exclusive=True), T.cumsum(1) - T),
    "cumsum_reverse": (lambda mb, x: mb.cumsum(x=x, axis=1, reverse=True), T.flip(1).cumsum(1).flip(1)),
}
BINARY: dict[str, tuple[Any, Any]] = {
    "add": (lambda mb, x, y: mb.add(x=x, y=y), T + TY),
    "sub": (lambda mb, x, y: mb.sub(x=x, y=y), T - TY),
    "mul": (lambda mb, x, y: mb.mul(x=x, y=y), T * TY),
    "real_div": (lambda mb, x, y: mb.real_div(x=x, y=y), T / TY),
    "floor_div": (lambda mb, x, y: mb.floor_div(x=x, y=y), torch.floor_divide(T, TY)),
    "mod": (lambda mb, x, y: mb.mod(x=x, y=y), torch.remainder(T, TY)),
    "pow": (lambda mb, x, y: mb.pow(x=mb.abs(x=x), y=y), T.abs() ** TY),
    "maximum": (lambda mb, x, y: mb.maximum(x=x, y=y), torch.maximum(T, TY)),
    "minimum": (lambda mb, x, y: mb.minimum(x=x, y=y), torch.minimum(T, TY)),
    "equal": (lambda mb, x, y: mb.equal(x=mb.floor(x=x), y=mb.floor(x=y)), T.floor() == TY.floor()),
    "not_equal": (lambda mb, x, y: mb.not_equal(x=mb.floor(x=x), y=mb.floor(x=y)), T.floor() != TY.floor()),
    "greater": (lambda mb, x, y: mb.greater(x=x, y=y), T > TY),
    "greater_equal": (lambda mb, x, y: mb.greater_equal(x=x, y=x), T >= T),
    "less": (lambda mb, x, y: mb.less(x=x, y=y), T < TY),
    "less_equal": (lambda mb, x, y: mb.less_equal(x=x, y=x), T <= T),
    "and": (lambda mb, x, y: mb.logical_and(x=mb.greater(x=x, y=0.0), y=mb.greater(x=y, y=1.0)), (T > 0) & (TY > 1)),
    "or": (lambda mb, x, y: mb.logical_or(x=mb.greater(x=x, y=0.0), y=mb.greater(x=y, y=1.0)), (T > 0) | (TY > 1)),
    "xor": (lambda mb, x, y: mb.logical_xor(x=mb.greater(x=x, y=0.0), y=mb.greater(x=y, y=1.0)), (T > 0) ^ (TY > 1)),
    "not": (lambda mb, x, y: mb.logical_not(x=mb.greater(x=x, y=0.0)), ~(T > 0)),
}
REDUCED: dict[str, tuple[Any, Any]] = {
    "argmax": (lambda mb, x: mb.reduce_argmax(x=x, axis=1), T.argmax(1)),
    "argmin": (lambda mb, x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), T.argmin(-1, keepdim=True)),
    "l1": (lambda mb, x: mb.reduce_l1_norm(x=x, axes=[1, 3]), T.abs().sum((1, 3))),
    "l2": (lambda mb, x: mb.reduce_l2_norm(x=x, axes=[-1], keep_dims=True), T.norm(dim=-1, keepdim=True)),
    "log_sum": (lambda mb, x: mb.reduce_log_sum(x=mb.abs(x=x), axes=[1]), T.abs().sum(1).log()),
    "log_sum_exp": (lambda mb, x: mb.reduce_log_sum_exp(x=mb.mul(x=x, y=100.0), axes=[1]), (T * 100).logsumexp(1)),
    "max": (lambda mb, x: mb.reduce_max(x=x, axes=[0, 2]), T.amax((0, 2))),
    "min": (lambda mb, x: mb.reduce_min(x=x), T.min()),
    "mean": (lambda mb, x: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True), T.mean((2, 3), keepdim=True)),
    "prod": (lambda mb, x: mb.reduce_prod(x=x, axes=[3]), T.prod(3)),
    "sum": (lambda mb, x: mb.reduce_sum(x=x, axes=[0]), T.sum(0)),
    "sum_square": (lambda mb, x: mb.reduce_sum_square(x=x, axes=[1, 2]), (T * T).sum((1, 2))),
}


@pytest.mark.parametrize(("cases", "inputs"), [(UNARY, [X]), (BINARY, [X, Y]), (REDUCED, [X])], ids=["unary", "binary", "reduced"])
def test_elementwise_operators_and_reductions_equal_pytorch(tmp_path: Path, cases: dict[str, Any], inputs: list[Any]) -> None:
    found = results(package(tmp_path / "p.mlpackage", {name: build for name, (build, _) in cases.items()}, *inputs), *inputs)
    for name, (_, expected) in cases.items():
        try:
            assert_close(found[name][0], expected, 3e-6)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_whole_numbers_are_divided_as_c_and_python_do(tmp_path: Path) -> None:
    x, y = i32([7, -7, 8, 2**31 - 1]), i32([2, 2, -3, 1])
    cases = {
        "floor_div": lambda mb, x, y: mb.floor_div(x=x, y=y),
        "mod": lambda mb, x, y: mb.mod(x=x, y=y),
        "real_div": lambda mb, x, y: mb.real_div(x=x, y=y),
        "overflow": lambda mb, x, y: mb.add(x=x, y=y),
    }
    found = results(package(tmp_path / "p.mlpackage", cases, x, y), x, y)
    assert found["floor_div"][0].tolist() == [3, -4, -3, 2**31 - 1]
    assert found["mod"][0].tolist() == [1, 1, -1, 0]
    assert found["real_div"][0].tolist() == [3, -3, -2, 2**31 - 1]
    assert found["overflow"][0].tolist() == [9, -5, 5, -(2**31)]


def test_products_equal_pytorch(tmp_path: Path) -> None:
    weight, bias = GENERATOR.standard_normal((6, 5)).astype(np.float32), GENERATOR.standard_normal(6).astype(np.float32)
    other = GENERATOR.standard_normal((2, 4, 3, 5)).astype(np.float32)
    cases: dict[str, tuple[Any, Any]] = {
        "linear": (lambda mb, x, y: mb.linear(x=x, weight=weight, bias=bias), F.linear(T, *map(torch.from_numpy, (weight, bias)))),
        "linear_alone": (lambda mb, x, y: mb.linear(x=x, weight=weight), F.linear(T, torch.from_numpy(weight))),
        "transposed": (lambda mb, x, y: mb.matmul(x=x, y=x, transpose_y=True), T @ T.mT),
        "both": (lambda mb, x, y: mb.matmul(x=x, y=x, transpose_x=True), T.mT @ T),
        "einsum": (
            lambda mb, x, y: mb.einsum(values=[x, mb.transpose(x=y, perm=[0, 3, 1, 2])], equation="nchw,nwhu->nchu"),
            torch.einsum("nchw,nwhu->nchu", T, torch.from_numpy(other).permute(0, 3, 1, 2)),
        ),
    }
    found = results(package(tmp_path / "p.mlpackage", {name: build for name, (build, _) in cases.items()}, X, other), X, other)
    for name, (_, expected) in cases.items():
        assert_close(found[name][0], expected, 1e-5)


def test_normalisations_equal_pytorch(tmp_path: Path) -> None:
    gamma, beta = SMALL, f32([1, 0, -1])
    mean, variance = f32([0.1, 0.2, 0.3]), f32([1, 2, 3])
    scale, shift = (torch.from_numpy(part) for part in (gamma, beta))
    wide = np.linspace(0.5, 2, 20, dtype=np.float32).reshape(4, 5)
    cases: dict[str, tuple[Any, Any]] = {
        "layer": (
            lambda mb, x: mb.layer_norm(x=x, axes=[-2, -1], gamma=wide, beta=wide, epsilon=1e-3),
            F.layer_norm(T, (4, 5), torch.from_numpy(wide), torch.from_numpy(wide), 1e-3),
        ),
        "layer_of_channels": (lambda mb, x: mb.layer_norm(x=x, axes=[1]), F.layer_norm(T.movedim(1, -1), (3,)).movedim(-1, 1)),
        "batch": (
            lambda mb, x: mb.batch_norm(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3),
            F.batch_norm(T, torch.from_numpy(mean), torch.from_numpy(variance), scale, shift, eps=1e-3),
        ),
        "instance": (
            lambda mb, x: mb.instance_norm(x=x, gamma=gamma, beta=beta, epsilon=1e-3),
            F.instance_norm(T, weight=scale, bias=shift, eps=1e-3),
        ),
        "l2": (lambda mb, x: mb.l2_norm(x=x, epsilon=1e-3), T / ((T * T).sum((1, 2, 3), keepdim=True) + 1e-3).sqrt()),
        "response": (
            lambda mb, x: mb.local_response_norm(x=x, size=3, alpha=0.5, beta=0.75, k=2.0),
            F.local_response_norm(T, 3, 0.5, 0.75, 2.0),
        ),
    }
    found = results(package(tmp_path / "p.mlpackage", {name: build for name, (build, _) in cases.items()}, X), X)
    for name, (_, expected) in cases.items():
        assert_close(found[name][0], expected, 1e-5)


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_attention_equals_pytorch(tmp_path: Path, masked: str) -> None:
    query, key, value = (GENERATOR.standard_normal((1, 2, 3, 8)).astype(np.float32) for _ in range(3))
    seen = np.tril(np.ones((3, 3), bool))
    mask = {"none": None, "bool": seen, "float": np.where(seen, np.float32(0), np.float32(-4))}[masked]
    extra = {} if mask is None else {"attn_mask": mask}
    cases = {"a": lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, **extra)}
    found = results(package(tmp_path / "p.mlpackage", cases, query, key, value), query, key, value)["a"][0]
    given = None if mask is None else torch.from_numpy(mask)
    expected = F.scaled_dot_product_attention(torch.from_numpy(query), torch.from_numpy(key), torch.from_numpy(value), given)
    assert_close(found, expected, 1e-5)


def test_half_precision_is_rounded_once_after_each_operator(tmp_path: Path) -> None:
    half = X.astype(np.float16)
    big = f16([[300, 250, 2], [1, 1, 1]])
    cases = {
        "square": lambda mb, x, y: mb.square(x=y),
        "mean": lambda mb, x, y: mb.reduce_mean(x=y, axes=[1]),
        "sum": lambda mb, x, y: mb.reduce_sum(x=mb.mul(x=y, y=np.float16(200)), axes=[1]),
        "gelu": lambda mb, x, y: mb.gelu(x=x),
    }
    found = results(package(tmp_path / "p.mlpackage", cases, half, big), half, big)
    assert {value[0].dtype for value in found.values()} == {np.dtype(np.float16)}
    assert found["square"][0].tolist() == [[math.inf, 62496.0, 4.0], [1.0, 1.0, 1.0]]
    assert found["mean"][0].tolist() == [184.0, 1.0]
    assert found["sum"][0].tolist() == [math.inf, 600.0]  # 110400 leaves its range
    expected = F.gelu(torch.from_numpy(half.astype(np.float64))).to(torch.float16)
    np.testing.assert_array_equal(found["gelu"][0], expected)


def test_the_error_function_is_as_good_as_float32_can_tell() -> None:
    x = np.linspace(-7, 7, 10001)
    exact = np.array([math.erf(value) for value in x])
    assert np.abs(erf(x) - exact).max() < 2e-9
    near = f32([1e-30, -1e-7, 0, math.inf, -math.inf, math.nan])
    np.testing.assert_allclose(erf(near), f32([math.erf(value) for value in near]), rtol=1e-6)
