"""MIL's operators of pictures and signals: convolution, by PyTorch, and pooling and resizing, by numpy.

Source: the docstrings of coremltools/converters/mil/mil/ops/defs of coremltools@9.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from calque.errors import TargetUnavailable
from calque.runtime.mil_arithmetic import Array, Kernel
from calque.runtime.mil_layout import ints


def paddings(x: Array, window: list[int], strides: list[int], pad_type: str, pad: Any) -> list[tuple[int, int]]:
    """Return what goes before and after each spatial axis; ``same`` gives ceil(length / stride) places, the odd one last."""
    if pad_type == "valid":
        return [(0, 0)] * len(window)
    if pad_type == "custom":
        amounts = ints(pad)
        return list(zip(amounts[::2], amounts[1::2], strict=True))
    found = []
    for length, size, stride in zip(x.shape[2:], window, strides, strict=True):
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        less, more = total // 2, total - total // 2
        found.append({"same": (less, more), "same_lower": (more, less)}[pad_type])
    return found


def pytorch() -> Any:
    """Return PyTorch.

    Raises:
        TargetUnavailable: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise TargetUnavailable("convolutions of MIL are computed by PyTorch", [str(error)], "pip install torch") from error
    return torch


def tensor(x: Array) -> Any:
    """Return PyTorch's view of an array; of one that may not be written, like a weight in its file, a copy."""
    return pytorch().from_numpy(x if x.flags.writeable else x.copy())


def conv(
    x: Array,
    weight: Array,
    bias: Any = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """Return the convolution of x, of one to three spatial axes."""
    torch, rank = pytorch(), x.ndim - 2
    steps = [1] * rank if strides is None else ints(strides)
    spread = [1] * rank if dilations is None else ints(dilations)
    window = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], spread, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *paddings(x, window, steps, pad_type, [0] * 2 * rank if pad is None else pad)])
    run = [torch.conv1d, torch.conv2d, torch.conv3d][rank - 1]
    parts = (None if part is None else tensor(part) for part in (padded, weight, bias))
    return run(*parts, stride=steps, dilation=spread, groups=int(groups)).numpy()


def conv_transpose(
    x: Array,
    weight: Array,
    bias: Any = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: str = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """Return the transposed convolution of x: all of it, then what padding cuts off before, up to the length of the result."""
    torch, rank = pytorch(), x.ndim - 2
    steps = [1] * rank if strides is None else ints(strides)
    spread = [1] * rank if dilations is None else ints(dilations)
    run = [torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d][rank - 1]
    found = run(tensor(x), tensor(weight), stride=steps, dilation=spread, groups=int(groups)).numpy()
    amounts = [0] * 2 * rank if pad is None else ints(pad)
    for axis, stride in enumerate(steps):
        before, after = amounts[2 * axis : 2 * axis + 2] if pad_type == "custom" else (0, 0)
        length = found.shape[axis + 2] - before - after
        if pad_type.startswith("same"):
            length = x.shape[axis + 2] * stride
            before, odd = divmod(max(found.shape[axis + 2] - length, 0), 2)
            if odd and output_shape is None:
                raise ValueError(f"which side {pad_type} cuts more of is not written down")
        if output_shape is not None:
            length = ints(output_shape)[axis + 2]
        missing = [(0, 0)] * found.ndim
        missing[axis + 2] = (0, max(before + length - found.shape[axis + 2], 0))
        found = np.take(np.pad(found, missing), np.arange(before, before + length), axis + 2)
    return found if bias is None else found + np.reshape(bias, (-1,) + (1,) * rank)


def windows(
    x: Array, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil_mode: Any, fills: tuple[float, float]
) -> tuple[Array, tuple[int, ...]]:
    """Return the windows of a pool and the axes that they lie along; ``fills`` are for padding, and for what rounding up adds."""
    window = ints(kernel_sizes)
    steps = [1] * len(window) if strides is None else ints(strides)
    amounts = paddings(x, window, steps, pad_type, [0] * 2 * len(window) if pad is None else pad)
    found = np.pad(x, [(0, 0), (0, 0), *amounts], constant_values=fills[0])
    extra = [(0, 0), (0, 0)]
    for axis, (size, step, (before, after)) in enumerate(zip(window, steps, amounts, strict=True), 2):
        length = found.shape[axis]
        places = -(-(length - size) // step) if ceil_mode else (length - size) // step
        if ceil_mode and before + after and places * step >= x.shape[axis] + before:
            places -= 1  # the last window would begin in the padding
        extra.append((0, max(places * step + size - length, 0)))
    found = np.pad(found, extra, constant_values=fills[1])
    spatial = tuple(range(2, x.ndim))
    views = np.lib.stride_tricks.sliding_window_view(found, tuple(window), spatial)
    return views[(slice(None), slice(None), *(slice(None, None, step) for step in steps))], tuple(range(x.ndim, views.ndim))


def max_pool(x: Array, kernel_sizes: Any, pad_type: str, strides: Any = None, pad: Any = None, ceil_mode: Any = False) -> Array:
    """Return the largest element of each window."""
    views, axes = windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode, (-np.inf, -np.inf))
    return views.max(axes)


def avg_pool(
    x: Array,
    kernel_sizes: Any,
    pad_type: str,
    strides: Any = None,
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> Array:
    """Return the mean of each window; padding counts as zeros, unless it is excluded."""
    views, axes = windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode, (0, 0))
    counted = (0 if exclude_padding_from_average else 1, 0)
    counts, _ = windows(np.ones((1, 1, *x.shape[2:]), np.float32), kernel_sizes, strides, pad_type, pad, ceil_mode, counted)
    return views.sum(axes) / counts.sum(axes)


def l2_pool(x: Array, kernel_sizes: Any, pad_type: str, strides: Any = None, pad: Any = None, ceil_mode: Any = False) -> Array:
    """Return the root of the sum of squares of each window."""
    views, axes = windows(x * x, kernel_sizes, strides, pad_type, pad, ceil_mode, (0, 0))
    return np.sqrt(views.sum(axes))


def grid(length: int, wanted: int, mode: str) -> Array:
    """Return where in an axis the points of a resized one lie."""
    places = np.arange(wanted, dtype=np.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if wanted == 1:
            return np.array([(length - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0])
        found = places * (length - 1) / (wanted - 1)
    elif mode == "DEFAULT":
        found = places * ((length - length / wanted) / max(wanted - 1, 1))
    elif mode == "OFFSET_CORNERS":
        delta = max(1, length - 1) / wanted
        found = 0.5 * delta + places * delta
    elif mode == "UNALIGN_CORNERS":
        found = places * (length / wanted) + 0.5 * (length / wanted) - 0.5
    else:
        raise ValueError(f"no way to sample is called {mode}")
    return np.clip(found, 0, length - 1)


def interpolated(x: Array, axis: int, wanted: int, mode: str) -> Array:
    """Return x resized along an axis, between two elements by a straight line."""
    places = grid(x.shape[axis], wanted, mode)
    low = np.floor(places).astype(np.int64)
    shape = [1] * x.ndim
    shape[axis] = wanted
    share = (places - low).astype(np.float32).reshape(shape)
    above = np.take(x, np.minimum(low + 1, x.shape[axis] - 1), axis)
    return np.take(x, low, axis) * (1 - share) + above * share


def resize_bilinear(x: Array, target_size_height: Any = 1, target_size_width: Any = 1, sampling_mode: str = "DEFAULT") -> Array:
    """Return x with its last two axes resized."""
    tall = interpolated(x, x.ndim - 2, int(target_size_height), sampling_mode)
    return interpolated(tall, x.ndim - 1, int(target_size_width), sampling_mode)


def scaled(x: Array, height: Any, width: Any) -> tuple[int, int]:
    """Return the lengths of the last two axes by factors, rounded down; 1e-6 is more than float32 loses of a factor."""
    return int(np.floor(x.shape[-2] * float(height) + 1e-6)), int(np.floor(x.shape[-1] * float(width) + 1e-6))


def upsample_bilinear(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1, align_corners: Any = True) -> Array:
    """Return x with its last two axes resized by factors."""
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS"
    return resize_bilinear(x, *scaled(x, scale_factor_height, scale_factor_width), mode)


def nearest(x: Array, axis: int, wanted: int) -> Array:
    """Return x with every element of an axis repeated.

    Raises:
        ValueError: the new length is no multiple: which element is nearest is then not written down.
    """
    times, rest = divmod(wanted, x.shape[axis])
    if rest:
        raise ValueError(f"the nearest of {x.shape[axis]} for {wanted} places is not written down")
    return np.repeat(x, times, axis)


def resize_nearest_neighbor(x: Array, target_size_height: Any, target_size_width: Any) -> Array:
    """Return x with the elements of its last two axes repeated."""
    return nearest(nearest(x, x.ndim - 2, int(target_size_height)), x.ndim - 1, int(target_size_width))


def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    """Return x with the elements of its last two axes repeated by factors."""
    return resize_nearest_neighbor(x, *scaled(x, scale_factor_height, scale_factor_width))


def resize(x: Array, shape: Any, resized_dims: Any, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT") -> Array:
    """Return x with its last ``resized_dims`` axes of the lengths that ``shape`` ends with; 0 leaves one as it is."""
    lengths, count = ints(shape), int(resized_dims)
    if interpolation_mode not in ("LINEAR", "NEAREST_NEIGHBOR"):
        raise ValueError(f"no way to interpolate is called {interpolation_mode}")
    for back in range(1, count + 1):
        axis = x.ndim - back
        wanted = lengths[-back] or x.shape[axis]
        x = interpolated(x, axis, wanted, sampling_mode) if interpolation_mode == "LINEAR" else nearest(x, axis, wanted)
    return x


VISION: dict[str, Kernel] = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "l2_pool": l2_pool,
    "max_pool": max_pool,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
