"""Numpy arrays as torch's tensors and back, over the same memory where both can see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def to_tensor(array: NDArray[np.generic]) -> Tensor:
    """Return the array as a tensor over the same memory where numpy lets it be written; bfloat16 is ml_dtypes' in numpy."""
    import torch

    given = np.ascontiguousarray(array)
    if not given.flags.writeable:
        given = given.copy()
    if given.dtype.name == "bfloat16":
        return torch.from_numpy(given.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(given)


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's values, over the same memory where it lies in order."""
    import torch

    held = tensor.detach().cpu().contiguous()
    if held.dtype == torch.bfloat16:
        import ml_dtypes

        return held.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = held.numpy()
    return array
