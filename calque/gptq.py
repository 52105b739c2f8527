"""GPTQ: rounds a weight column by column, and lets the columns that follow make up for the error of each.

Source: GPTQ, arXiv 2210.17323, algorithm 1: Cholesky factor of the inverse Hessian, updates in blocks of 128 columns; groups take
their scales when they are reached, from the columns as they are by then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calque.quantization import Quantized, Scheme, nearest, ranges

# Columns whose updates of the others are made in one product. Source: arXiv 2210.17323, section 3.3, step 2.
BLOCK = 128
# What is added to the diagonal of the Hessian, as a share of its mean. Source: the same, step 3.
DAMPING = 0.01


def gptq(weight: Tensor, second: Tensor, scheme: Scheme, damping: float = DAMPING) -> Quantized:
    """Return integers of a weight [out, in] that keep the product with what it reads near, given its second moments [in, in].

    Each group's scale is searched, where the scheme says so, with the errors weighed as those that no later column can undo.
    """
    rows, columns = weight.shape
    group = scheme.group or columns
    left = weight.to(torch.float32).clone()
    factor = _inverse_factor(second, left, damping)
    weighing = factor.diagonal().square().reciprocal().reshape(-1, group)
    q = torch.empty(rows, columns, dtype=scheme.dtype)
    scale = torch.empty(rows, columns // group)
    zero = None if scheme.symmetric else torch.empty(rows, columns // group, dtype=torch.int8)
    if not scheme.group:
        whole = ranges(left[:, None, :], scheme, weighing)
    step = max(BLOCK, scheme.group)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = torch.empty(rows, end - start)
        for column in range(start, end):
            place = column // group
            if scheme.group and column % group == 0:
                whole = ranges(left[:, None, column : column + group], scheme, weighing[place])
            steps, points = whole[0][:, 0], None if whole[1] is None else whole[1][:, 0]
            if column % group == 0:
                scale[:, place] = steps[:, 0]
                if zero is not None and points is not None:
                    zero[:, place] = points[:, 0].to(torch.int8)
            now = left[:, column : column + 1]
            rounded = nearest(now, steps, points, scheme)
            q[:, column] = rounded[:, 0].to(scheme.dtype)
            error = (now - (rounded if points is None else rounded - points) * steps) / factor[column, column]
            left[:, column + 1 : end] -= error * factor[column, column + 1 : end]
            errors[:, column - start] = error[:, 0]
        left[:, end:] -= errors @ factor[start:end, end:]
    return Quantized(q, scale, zero)


def _inverse_factor(second: Tensor, weight: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian; columns that never read anything become 0 in ``weight``."""
    hessian = second.to(torch.float64)
    dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(torch.float32)
