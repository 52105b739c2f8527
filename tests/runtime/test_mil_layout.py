from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calque.errors import Unsupported
from tests.runtime.mil_packages import assert_close, f16, i32, package, results

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((2, 3, 4, 5)).astype(np.float32)
T = torch.from_numpy(X)
ROWS = i32([2, 0])
BATCHED = GENERATOR.integers(0, 4, (2, 3, 2)).astype(np.int32)
POINTS = i32([[1, 0], [0, 2], [1, 0]])

MOVED: dict[str, tuple[Any, Any]] = {
    "argsort": (lambda mb, x: mb.argsort(x=x, axis=1, ascending=True), T.argsort(1)),
    "argsort_descending": (lambda mb, x: mb.argsort(x=x, axis=-1), T.argsort(-1, descending=True)),
    "band": (lambda mb, x: mb.band_part(x=x, lower=1, upper=0), T.tril().triu(-1)),
    "lower_triangle": (lambda mb, x: mb.band_part(x=x, lower=-1, upper=0), T.tril()),
    "cast": (lambda mb, x: mb.cast(x=mb.mul(x=x, y=3.0), dtype="int32"), (T * 3).to(torch.int32)),
    "cast_to_bool": (lambda mb, x: mb.cast(x=mb.floor(x=x), dtype="bool"), T.floor() != 0),
    "concat": (lambda mb, x: mb.concat(values=[x, x], axis=1), torch.cat([T, T], 1)),
    "concat_one": (lambda mb, x: mb.concat(values=[x], axis=1), T),
    "interleaved": (lambda mb, x: mb.concat(values=[x, mb.abs(x=x)], axis=2, interleave=True), torch.stack([T, T.abs()], 3).flatten(2, 3)),
    "expand": (lambda mb, x: mb.expand_dims(x=mb.reduce_max(x=x, axes=[0]), axes=[0, -1]), T.amax(0)[None, ..., None]),
    "fill": (lambda mb, x: mb.fill(shape=[2, 3], value=1.5), torch.full((2, 3), 1.5)),
    "fill_like": (lambda mb, x: mb.fill_like(ref_tensor=x, value=2), torch.full(T.shape, 2)),
    "flatten": (lambda mb, x: mb.flatten2d(x=x, axis=-2), T.reshape(6, 20)),
    "gather": (lambda mb, x: mb.gather(x=x, indices=ROWS, axis=1), T[:, ROWS.tolist()]),
    "gather_one": (lambda mb, x: mb.gather(x=x, indices=np.int32(2), axis=-2), T[:, :, 2]),
    "gather_batched": (
        lambda mb, x: mb.gather(x=x, indices=BATCHED, axis=2, batch_dims=2),
        torch.stack([torch.stack([T[i, j, BATCHED[i, j].tolist()] for j in range(3)]) for i in range(2)]),
    ),
    "gather_along": (
        lambda mb, x: mb.gather_along_axis(x=x, indices=np.tile(ROWS[:1], (2, 3, 1, 5)), axis=2),
        T.take_along_dim(torch.full((2, 3, 1, 5), 2), 2),
    ),
    "gather_nd": (lambda mb, x: mb.gather_nd(x=x, indices=POINTS), torch.stack([T[1, 0], T[0, 2], T[1, 0]])),
    "gather_nd_batched": (
        lambda mb, x: mb.gather_nd(x=x, indices=POINTS[:2, None], batch_dims=1),
        torch.stack([T[0, 1, 0], T[1, 0, 2]])[:, None],
    ),
    "identity": (lambda mb, x: mb.identity(x=x), T),
    "non_zero": (lambda mb, x: mb.non_zero(x=mb.relu(x=x)), T.relu().nonzero()),
    "one_hot": (
        lambda mb, x: mb.one_hot(indices=ROWS, one_hot_vector_size=4, on_value=2.0, off_value=-1.0),
        torch.nn.functional.one_hot(torch.tensor(ROWS).long(), 4) * 3 - 1,
    ),
    "one_hot_first": (
        lambda mb, x: mb.one_hot(indices=ROWS, one_hot_vector_size=4, axis=0),
        torch.nn.functional.one_hot(torch.tensor(ROWS).long(), 4).T,
    ),
    "pad": (lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=0.5), torch.nn.functional.pad(T, (0, 3, 1, 2), value=0.5)),
    "pad_reflect": (lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="reflect"), torch.nn.functional.pad(T, (0, 3, 1, 2), "reflect")),
    "pad_replicate": (lambda mb, x: mb.pad(x=x, pad=[1, 2], mode="replicate"), torch.nn.functional.pad(T, (1, 2, 0, 0), "replicate")),
    "range": (lambda mb, x: mb.range_1d(start=2, end=9, step=3), torch.arange(2, 9, 3)),
    "reshape": (lambda mb, x: mb.reshape(x=x, shape=[2, -1, 10]), T.reshape(2, 6, 10)),
    "reshape_zero": (lambda mb, x: mb.reshape(x=x, shape=[1, 2, 0, 0, -1]), T.reshape(1, 2, 3, 4, 5)),
    "reshape_like": (
        lambda mb, x: mb.reshape_like(
            x=x, ref_tensors=[x, mb.flatten2d(x=x, axis=3)], begins=[0, 1], ends=[3, 0], end_masks=[False, True]
        ),
        T,
    ),
    "reverse": (lambda mb, x: mb.reverse(x=x, axes=[1, 3]), T.flip(1, 3)),
    "select": (lambda mb, x: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=-1.0), torch.where(T > 0, T, -1.0)),
    "shape": (lambda mb, x: mb.shape(x=x), torch.tensor(T.shape)),
    "slice": (
        lambda mb, x: mb.slice_by_index(
            x=x, begin=[0, 1, 3, 1], end=[1, 0, 0, 4], stride=[1, 1, -2, 2], end_mask=[False, True, False, False]
        ),
        T[0:1, 1:].flip(2)[:, :, 0:3:2, 1:4:2],
    ),
    "slice_negative": (
        lambda mb, x: mb.slice_by_index(
            x=x, begin=[0, -1, 0, -2], end=[0, 0, -1, 0], begin_mask=[True, False, False, False],
            end_mask=[True, False, False, True], squeeze_mask=[False, True, False, False],
        ),
        T[:, -1, 0:-1, -2:],
    ),
    "slice_by_size": (lambda mb, x: mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[2, 1, -1, 3]), T[:, 1:2, 2:, :3]),
    "split": (lambda mb, x: mb.split(x=x, num_splits=2, axis=2)[1], T.chunk(2, 2)[1]),
    "split_sizes": (lambda mb, x: mb.split(x=x, split_sizes=[1, 4], axis=-1)[1], T[..., 1:]),
    "squeeze": (lambda mb, x: mb.squeeze(x=mb.reduce_max(x=x, axes=[0, 2], keep_dims=True), axes=[2]), T.amax((0, 2))[None]),
    "stack": (lambda mb, x: mb.stack(values=[x, x], axis=-1), torch.stack([T, T], -1)),
    "tile": (lambda mb, x: mb.tile(x=x, reps=[1, 2, 1, 3]), T.repeat(1, 2, 1, 3)),
    "topk": (lambda mb, x: mb.topk(x=x, k=2, axis=1)[1], T.topk(2, 1).indices),
    "topk_least": (lambda mb, x: mb.topk(x=x, k=2, axis=-1, ascending=True)[0], T.topk(2, -1, largest=False).values),
    "transpose": (lambda mb, x: mb.transpose(x=x, perm=[0, -1, 1, 2]), T.permute(0, 3, 1, 2)),
    "shuffle": (
        lambda mb, x: mb.pixel_shuffle(x=mb.transpose(x=x, perm=[0, 2, 1, 3]), upscale_factor=2),
        torch.pixel_shuffle(T.transpose(1, 2), 2),
    ),
    "unshuffle": (
        lambda mb, x: mb.pixel_unshuffle(x=mb.tile(x=x, reps=[1, 1, 1, 2]), downscale_factor=np.uint32(2)),
        torch.pixel_unshuffle(T.repeat(1, 1, 1, 2), 2),
    ),
    "windows": (lambda mb, x: mb.sliding_windows(x=x, axis=3, size=3, stride=2), T.unfold(3, 3, 2)),
    "crop": (lambda mb, x: mb.crop(x=x, crop_height=[1, 0], crop_width=[2, 1]), T[..., 1:, 2:4]),
}  # fmt: skip


def test_operators_that_move_values_equal_pytorch(tmp_path: Path) -> None:
    found = results(package(tmp_path / "p.mlpackage", {name: build for name, (build, _) in MOVED.items()}, X), X)
    for name, (_, expected) in MOVED.items():
        try:
            assert_close(found[name][0], expected)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_values_of_half_precision_are_moved_as_they_are(tmp_path: Path) -> None:
    x = f16([[65504, 6e-8, -1], [0.1, np.inf, 2]])
    cases = {"t": lambda mb, x: mb.transpose(x=x, perm=[1, 0]), "c": lambda mb, x: mb.concat(values=[x, x], axis=0)}
    found = results(package(tmp_path / "p.mlpackage", cases, x), x)
    assert found["t"][0].dtype == np.float16
    np.testing.assert_array_equal(found["t"][0], x.T)
    np.testing.assert_array_equal(found["c"][0], np.concatenate([x, x]))


@pytest.mark.parametrize("mode", ["update", "add", "sub", "mul", "div", "max", "min"])
def test_scattered_updates_are_as_documented(tmp_path: Path, mode: str) -> None:
    updates = (GENERATOR.random((2, 2, 4, 5)) + 0.5).astype(np.float32)
    nd = (GENERATOR.random((3, 4, 5)) + 0.5).astype(np.float32)
    along = i32([[2, 0], [1, 3], [0, 2]])
    data = X[0, :, :, 0]
    lines = (GENERATOR.random((3, 2)) + 0.5).astype(np.float32)
    points = POINTS[:2] if mode == "update" else POINTS  # of two updates of one place, which stays is not documented
    cases = {
        "scatter": lambda mb, x: mb.scatter(data=x, indices=ROWS, updates=updates, axis=1, mode=mode),
        "nd": lambda mb, x: mb.scatter_nd(data=x, indices=points, updates=nd[: len(points)], mode=mode),
        "along": lambda mb, x: mb.scatter_along_axis(data=data, indices=along, updates=lines, axis=1, mode=mode),
    }
    found = results(package(tmp_path / "p.mlpackage", cases, X), X)
    changes: dict[str, Any] = {
        "update": lambda old, new: new,
        "add": lambda old, new: old + new,
        "sub": lambda old, new: old - new,
        "mul": lambda old, new: old * new,
        "div": lambda old, new: old / new,
        "max": np.maximum,
        "min": np.minimum,
    }
    change = changes[mode]
    scattered, pointed, lined = X.copy(), X.copy(), data.copy()
    for place, row in enumerate(ROWS):
        scattered[:, row] = change(scattered[:, row], updates[:, place])
    for place, (first, second) in enumerate(points):
        pointed[first, second] = change(pointed[first, second], nd[place])
    for (row, place), column in np.ndenumerate(along):
        lined[row, column] = change(lined[row, column], lines[row, place])
    for name, expected in (("scatter", scattered), ("nd", pointed), ("along", lined)):
        assert_close(found[name][0], expected)


def test_a_slice_is_updated_where_it_was(tmp_path: Path) -> None:
    update = np.full((2, 1, 2, 5), 9, np.float32)
    cases = {
        "plain": lambda mb, x: mb.slice_update(
            x=x, update=update, begin=[0, 1, 1, 0], end=[0, 2, 4, 0], stride=[1, 1, 2, 1],
            begin_mask=[True, False, False, True], end_mask=[True, False, False, True],
        ),
        "squeezed": lambda mb, x: mb.slice_update(
            x=x, update=update[:, 0, 0], begin=[0, 1, 3, 0], end=[2, 0, 0, 5], squeeze_mask=[False, True, True, False]
        ),
        "kept": lambda mb, x: mb.identity(x=x),
    }  # fmt: skip
    found = results(package(tmp_path / "p.mlpackage", cases, X), X)
    plain, squeezed = X.copy(), X.copy()
    plain[:, 1:2, 1:4:2], squeezed[:, 1, 3] = 9, 9
    assert_close(found["plain"][0], plain)
    assert_close(found["squeezed"][0], squeezed)
    assert_close(found["kept"][0], X)


def test_space_and_depth_are_exchanged_as_tensorflow_does(tmp_path: Path) -> None:
    x = np.arange(32, dtype=np.float32).reshape(1, 8, 2, 2)
    cases = {
        "space": lambda mb, x: mb.depth_to_space(x=x, block_size=2),
        "back": lambda mb, x: mb.space_to_depth(x=mb.depth_to_space(x=x, block_size=2), block_size=2),
    }
    found = results(package(tmp_path / "p.mlpackage", cases, x), x)
    # Channels 0, 2, 4 and 6 are the block of the first channel.
    assert found["space"][0][0, 0].tolist() == [[0, 8, 1, 9], [16, 24, 17, 25], [2, 10, 3, 11], [18, 26, 19, 27]]
    assert_close(found["back"][0], x)


@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
@pytest.mark.parametrize("place", [-1, 3])
def test_places_outside_of_an_axis_are_refused(tmp_path: Path, target: str, place: int) -> None:
    indices = i32([place])
    path = package(tmp_path / "p.mlpackage", {"g": lambda mb, x, y: mb.gather(x=x, indices=y, axis=1)}, X, indices, target=target)
    if target == "iOS16" and place == -1:  # it counted from the end, up to there
        assert_close(results(path, X, indices)["g"][0], X[:, [-1]])
        return
    with pytest.raises(Unsupported, match="has no result for these values") as raised:
        results(path, X, indices)
    assert f"places from {place} to {place}" in str(raised.value)
