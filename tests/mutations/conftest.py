from __future__ import annotations

from collections.abc import Iterator

import pytest

from calque import threads


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Tensors this small are slower on several, many times so where others want the cores too.
    with threads.one_thread():
        yield
