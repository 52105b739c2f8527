"""The images that a model is asked: each has a number, and is made anew wherever it is needed, to the same bits everywhere.

They are as a preprocessor leaves them: around 0, of about unit variance. An ordinary image differs from the others at every scale, as
photographs do: in its tint, in what stands where, in its grain. Noise alone would not show that a model mixes two images up, as it is
much the same on average. All values are whole 256ths, few enough that float16 holds them exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.artifact import TensorSpec

# Dark, grey and bright all over, and each pixel either dark or bright: what black and white are after ImageNet's normalization, about.
DARK, BRIGHT = -2.25, 2.75
LEVELS = ((DARK,), (0.0,), (BRIGHT,), (DARK, BRIGHT))
PLAIN = (0, 1, 2, 3)
RANDOM = (4, 5, 6, 7, 8)
# In how many cells a side each scale divides an image (None: pixels), and of how many random bytes a cell's value is the sum.
SCALES: tuple[tuple[int | None, int], ...] = ((1, 2), (4, 2), (None, 4))
MEAN_OF_BYTE, STEPS = 127.5, 256
SEED = 224


def images(numbers: Iterable[int], spec: TensorSpec) -> NDArray[np.float32]:
    """Return the images of those numbers, of the size that ``spec`` says: float32 [images, channels, height, width]."""
    _, channels, height, width = spec.shape
    return np.stack([image(int(number), int(channels), int(height), int(width)) for number in numbers])


def image(number: int, channels: int, height: int, width: int) -> NDArray[np.float32]:
    """Return one image, float32 [channels, height, width]; of numbers in ``PLAIN`` an extreme one."""
    # The raw bits: what numpy makes of them, normal numbers for one, may change between its versions.
    bits = np.random.PCG64([SEED, number])
    if number in PLAIN:
        levels = np.array(LEVELS[number], dtype=np.float32)
        return levels[_bytes(bits, (channels, height, width)) % len(levels)]
    total = np.zeros((channels, height, width), dtype=np.int64)
    for cells, count in SCALES:
        rows, columns = min(cells or height, height), min(cells or width, width)
        drawn = _bytes(bits, (channels, rows, columns, count)).sum(axis=3, dtype=np.int64)
        total += drawn[:, np.arange(height) * rows // height][:, :, np.arange(width) * columns // width]
    middle = MEAN_OF_BYTE * sum(count for _, count in SCALES)
    return ((total - middle) / STEPS).astype(np.float32)


def _bytes(bits: np.random.PCG64, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    count = int(np.prod(shape))
    words = np.atleast_1d(bits.random_raw(-(-count // 8))).astype("<u8")
    return words.view(np.uint8)[:count].reshape(shape)
