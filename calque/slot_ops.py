"""The semantic operator of attention over slots whose mask is no more than a length a row.

As in ``calque/ops.py`` it has a fake, and a reference in plain tensor operations that is its decomposition as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calque.ops import decompose_attention


@torch.library.custom_op("calque::prefix_attention", mutates_args=())
def prefix_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Return attention [B, H, S, Dv] of queries that are the last of each row's first ``lengths`` keys.

    q [B, H, S, D], k [B, Hkv, M, D], v [B, Hkv, M, Dv]; ``lengths`` int32 [B] counts the slots up to a row's last query: query ``i``
    sees the slots ``j <= i + lengths - S``.
    """
    last_seen = lengths.to(torch.int64)[:, None] - q.shape[2] + torch.arange(q.shape[2])
    seen = torch.arange(k.shape[2])[None, None, None, :] <= last_seen[:, None, :, None]
    return decompose_attention(q, k, v, seen, scale, 0.0, None, False)


@prefix_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
