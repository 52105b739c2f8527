"""What a model carries from one call to the next, said without a layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["key", "value", "conv", "recurrent"]
Update = Literal["append", "replace", "in_place"]


@dataclass(frozen=True)
class StateSpec:
    """One state of one layer: its names in the artifact, its shape, and how it changes.

    ``shape`` holds ints and dimension names, ``[batch_size, heads, past_sequence_length, head_size]`` for keys and
    values; ``grow_axis`` is the axis along which ``append`` grows it, None for states of fixed size. ``window`` is the
    sliding window of the layer, None where it sees everything; dynamic states hold every position all the same, the
    window is applied by the mask.
    """

    layer: int
    kind: Kind
    input: str
    output: str
    grow_axis: int | None
    update: Update
    window: int | None
    dtype: str
    shape: tuple[int | str, ...]
    init: str = "empty"

    @property
    def name(self) -> str:
        """The name that ``calque::cache_update`` carries: ``{layer}.{kind}``."""
        return f"{self.layer}.{self.kind}"


def key_value_states(layer: int, heads: int, key_size: int, value_size: int, window: int | None) -> tuple[StateSpec, StateSpec]:
    """Return the key and the value state of an attention layer, named as contracts fix them."""

    def spec(kind: Kind, size: int) -> StateSpec:
        return StateSpec(
            layer=layer,
            kind=kind,
            input=f"past_key_values.{layer}.{kind}",
            output=f"present.{layer}.{kind}",
            grow_axis=2,
            update="append",
            window=window,
            dtype="float32",
            shape=("batch_size", heads, "past_sequence_length", size),
        )

    return spec("key", key_size), spec("value", value_size)
