"""The one way anything runs an artifact: names and numpy arrays in, names and numpy arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = Mapping[str, "NDArray[np.generic]"]


class Session(Protocol):
    """Runs one graph of an artifact."""

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return every output of ``graph`` by name.

        Raises:
            Unsupported: the inputs go past a limit that the manifest records.
        """
        ...
