"""Whether a conversion fits into the memory that it may use, and how its proof must run for that; said before weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calque import preflight
from calque.console import size
from calque.errors import WontFit

if TYPE_CHECKING:
    from calque.traced import TracedModel

# More than this at a time makes the proof no faster.
LARGEST_BLOCK = 256 << 20


def require_tools(allowed: int | None) -> None:
    """Leave quietly if what converts fits into the memory allowed by itself; None allows anything.

    Raises:
        WontFit: how much it takes.
    """
    if allowed is not None and allowed < preflight.TOOLS_BYTES:
        takes = size(preflight.TOOLS_BYTES)
        raise WontFit(
            f"torch and transformers alone take {takes}, {size(allowed)} are allowed",
            fix="allow more with --max-memory; --plan says how much this model takes",
        )


def require_memory(model: TracedModel, allowed: int | None, blocks: bool, mapped: int = 0, writes: int = 0) -> int:
    """Return of how many bytes of weights at a time the proof may run the artifact, 0 where all of them fit; None allows anything.

    ``blocks``: whether the target's artifacts can be run so. ``mapped``, ``writes``: as `preflight.peak_memory` takes them.

    Raises:
        WontFit: what passes the memory allowed, and the least that would do.
    """
    if allowed is None:
        return 0
    needs = preflight.peak_memory(model, mapped, writes=writes)
    least = {"convert": needs["convert"], "prove": min(needs["prove"], needs["prove_by_blocks"]) if blocks else needs["prove"]}
    if lines := [f"{stage}  needs {size(count)}" for stage, count in least.items() if count > allowed]:
        fix = f"allow at least {size(max(least.values()))} with --max-memory"
        raise WontFit(f"the conversion does not fit into {size(allowed)} of memory", lines, fix)
    if needs["prove"] <= allowed:
        return 0
    smallest = preflight.smallest_block(model)
    room = allowed - needs["prove_by_blocks"] + preflight.block_memory(model, smallest)
    return max(smallest, min(LARGEST_BLOCK, preflight.block_for(model, room)))
