from __future__ import annotations

import hashlib

import numpy as np
import pytest

from calque.artifact import TensorSpec
from calque.validation.images import BRIGHT, DARK, PLAIN, RANDOM, image, images

SHAPE = (3, 30, 41)


def test_images_are_the_same_bits_everywhere() -> None:
    drawn = images((*PLAIN, *RANDOM), TensorSpec("pixel_values", "float32", ("batch_size", 3, 13, 8)))
    assert drawn.dtype == np.float32
    digest = hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "afd5457d18f7566e"


@pytest.mark.parametrize("number", [*PLAIN, *RANDOM])
def test_float16_holds_an_image_exactly(number: int) -> None:
    drawn = image(number, *SHAPE)
    assert np.array_equal(drawn.astype(np.float16).astype(np.float32), drawn)


def test_ordinary_images_look_preprocessed_and_differ_at_every_scale() -> None:
    drawn = np.stack([image(number, 3, 224, 224) for number in range(4, 36)])
    assert abs(float(drawn.mean())) < 0.1
    assert 0.6 < float(drawn.std()) < 1.0
    assert float(drawn.mean(axis=(2, 3)).std()) > 0.3
    cells = drawn.reshape(32, 3, 4, 56, 4, 56).mean(axis=(3, 5))
    assert float((cells - cells.mean(axis=(2, 3), keepdims=True)).std()) > 0.3
    assert float((drawn[:, :, ::2] - drawn[:, :, 1::2]).std()) > 0.5


def test_plain_images_are_at_the_ends_of_the_range() -> None:
    dark, grey, bright, both = (image(number, *SHAPE) for number in PLAIN)
    assert [set(np.unique(drawn)) for drawn in (dark, grey, bright, both)] == [{DARK}, {0.0}, {BRIGHT}, {DARK, BRIGHT}]
    assert 0.4 < float((both == DARK).mean()) < 0.6


def test_image_smaller_than_its_coarsest_cells_is_an_image() -> None:
    assert image(RANDOM[0], 1, 2, 3).shape == (1, 2, 3)
