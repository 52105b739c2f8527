"""Inputs held against what the manifest says an artifact must not be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from calque.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calque.artifact import Limits


def check_limits(limits: Limits, inputs: Mapping[str, NDArray[np.generic]]) -> None:
    """Leave quietly if the call is within the limits; what the inputs do not tell is taken to be.

    Raises:
        Unsupported: padding, a batched chunk, a length or a continued cache that the artifact cannot do.
        UsageError: lengths of a static cache that no call can have.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        return
    batch, width = ids.shape
    if "write_indices" in inputs:
        held, reached = inputs["write_indices"].astype("int64"), inputs["kv_lengths"].astype("int64")
        continued = bool(held.any())
        _check_slots(limits, held, reached, width, inputs.get("position_ids"))
    elif mask is not None:
        seen = mask.astype(bool)
        past = seen.shape[1] - width
        continued = past > 0
        held, reached = seen[:, :past].sum(axis=1), seen.sum(axis=1)
        _check_padding(limits, seen, past)
    else:
        return
    if not limits.batched_chunk and batch > 1 and width > 1 and continued:
        raise Unsupported(
            f"the artifact cannot take {width} tokens of {batch} rows at once over a cache (batched_chunk: false)",
            fix="feed such prompts in one call, or row by row",
        )
    longest = int(reached.max(initial=0))
    if limits.max_length is not None and longest > limits.max_length:
        raise Unsupported(
            f"a row would hold {longest} tokens, the artifact's max_length is {limits.max_length}",
            fix="cut the prompt, or stop generating there",
        )
    # There attention looks angles up by slot, and wants one for every slot of the cache.
    if mask is not None and limits.max_length is not None and limits.padding == "right" and mask.shape[1] > limits.max_length:
        raise Unsupported(
            f"the cache would have {mask.shape[1]} slots, padding among them, the artifact's max_length is {limits.max_length}",
            fix="pad no further than the longest row",
        )
    limit = limits.recompute_at
    if limit is not None and bool(((held > 0) & (held <= limit) & (reached > limit)).any()):
        raise Unsupported(
            f"a cache of at most {limit} tokens may not be continued past {limit}: the rotary frequencies of its keys change there",
            fix="start from an empty cache and feed every row's tokens again from the first",
        )


def _check_slots(
    limits: Limits, held: NDArray[np.int64], reached: NDArray[np.int64], width: int, positions: NDArray[np.generic] | None
) -> None:
    """Leave quietly if every row's tokens fill its slots in order and the call ends before the slots do."""
    wrong = [
        f"row {row}: write_indices {first}, kv_lengths {last}, {width} new"
        for row, (first, last) in enumerate(zip(held.tolist(), reached.tolist(), strict=True))
        if not 0 <= first <= last <= first + width
    ]
    if wrong:
        raise UsageError(
            "kv_lengths is no length that the call can lead to", wrong, "write_indices, and the row's new tokens without padding"
        )
    if positions is not None:
        column = np.arange(width)
        token = column < (reached - held)[:, None]
        if bool((token & (positions != held[:, None] + column)).any()):
            raise Unsupported(
                "a row's tokens must fill its slots from 0: position_ids say otherwise", fix="put the padding after each row's tokens"
            )
    if limits.padding == "none" and bool((reached < held + width).any()):
        raise Unsupported("the artifact takes no padding (padding: none)", fix="run rows of unequal length one by one")
    # Padding is written too, after the tokens, and one past the last slot would be another row's.
    if limits.max_length is not None and int(held.max(initial=0)) + width > limits.max_length:
        raise Unsupported(
            f"a call of {width} tokens from slot {int(held.max())} ends past the slots: the artifact's max_length is {limits.max_length}",
            fix="cut the prompt or its padding, or stop generating there",
        )


def _check_padding(limits: Limits, seen: NDArray[np.bool_], past: int) -> None:
    if limits.padding == "none" and not seen.all():
        raise Unsupported("the artifact takes no padding (padding: none)", fix="run rows of unequal length one by one")
    if limits.padding != "right":
        return
    new = seen[:, past:]
    # Of the new tokens alone: what stands in the mask before them are calls that were let through.
    if bool((new[:, 1:] & ~new[:, :-1]).any()) or bool((~seen[:, 0] & seen.any(axis=1)).any()):
        raise Unsupported("the artifact takes padding on the right alone (padding: right)", fix="put the padding after each row's tokens")
    # Where tokens lie in the cache is told from how many there are: a row that gets none would lose its last.
    if not bool(new.any(axis=1).all()):
        raise Unsupported(
            "the artifact takes at least one token of every row in a call (padding: right)", fix="leave out rows that have ended"
        )
    if past > 0 and not bool(new.all()):
        raise Unsupported("the artifact takes no padding among tokens that continue a cache (padding: right)", fix="leave the padding out")
