"""Weights as a table: a parameter is named bytes in a file, or a function of others, never a tensor held in memory."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calque.errors import SourceUnreadable, WeightMismatch

if TYPE_CHECKING:
    import torch

# safetensors' dtype names -> torch's and the bytes of one element. Source: safetensors format, README@0.8.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


# What the rows that are in memory together take in float32: small beside the tools, large beside what a read costs.
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes in a file: ``nbytes`` of them from ``offset``; ``dtype`` is safetensors' name.

    ``strides``, in elements, of a tensor that a pickle holds transposed, cut out of another, or expanded; None: row by row.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def read(self) -> torch.Tensor:
        """Return the tensor, read now; the caller owns the only copy.

        Raises:
            SourceUnreadable: the file became shorter since its header was read, or is gone.
        """
        try:
            return self._read()
        except OSError as error:
            raise SourceUnreadable(
                f"{self.file} cannot be read any more: {error.strerror}", fix="leave its folder as it is during a conversion"
            ) from error

    @property
    def by_rows(self) -> bool:
        """Whether `read_rows` reads those rows alone."""
        return self.strides is None and len(self.shape) > 1

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop``; where they do not lie one after the other, the whole is read for them."""
        if not self.by_rows:
            return self.read()[start:stop]
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        part = replace(self, offset=self.offset + start * row, nbytes=(stop - start) * row, shape=(stop - start, *self.shape[1:]))
        return part.read()

    def _read(self) -> torch.Tensor:
        import torch

        torch_dtype = getattr(torch, DTYPES[self.dtype][0])
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=torch_dtype)
        data = bytearray(self.nbytes)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            # A read of more than 2 GiB is cut short by the kernel, so go on until all is there.
            view, done = memoryview(data), 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise SourceUnreadable(
                        f"{self.file} is truncated: it ends {self.nbytes - done} bytes early", fix="fetch the file again"
                    )
                done += count
            # Pages that were read once are of no more use to us; give them back to the system.
            os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)
        flat = torch.frombuffer(data, dtype=torch_dtype)
        return flat.reshape(self.shape) if self.strides is None else flat.as_strided(self.shape, self.strides).contiguous()


@dataclass(frozen=True)
class Derived:
    """A tensor computed from others when it is read: transposed, stacked, cast, packed, quantized.

    ``dtype`` is torch's name without the prefix (``float32``). ``moved``: each value is one of its sources', elsewhere laid, so
    that rounding it before or after is one. ``acts``: on the whole of its sources, on each row of them by itself, or it lays
    their rows one after the other. ``rows``: what gives some rows, where there are no sources.
    """

    sources: tuple[Weight, ...]
    operation: str
    function: Callable[..., torch.Tensor] = field(repr=False, compare=False)
    dtype: str
    shape: tuple[int, ...]
    moved: bool = True
    acts: Literal["whole", "each row", "stacks"] = "whole"
    rows: Callable[[int, int], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def by_rows(self) -> bool:
        """Whether `read_rows` computes those rows alone."""
        return self.rows is not None or (self.acts != "whole" and all(source.by_rows for source in self.sources))

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop``, computed of the same rows of the sources; of all where that is not enough."""
        if not self.by_rows:
            return self.read()[start:stop]
        if self.rows is not None:
            return self.rows(start, stop)
        if self.acts == "each row":
            return self.function(*(source.read_rows(start, stop) for source in self.sources))
        parts, above = [], 0
        for source in self.sources:
            low, high = max(start - above, 0), min(stop - above, source.shape[0])
            if low < high:
                parts.append(source.read_rows(low, high))
            above += source.shape[0]
        return self.function(*parts)

    def read(self) -> torch.Tensor:
        """Return the tensor, computed now from sources that are read one after the other."""
        tensor = self.function(*(source.read() for source in self.sources))
        if tuple(tensor.shape) != self.shape:
            raise AssertionError(f"{self.operation} gave {tuple(tensor.shape)}, declared {self.shape}")
        return tensor


Weight = Stored | Derived


def pieces(weight: Weight, nbytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """Yield the rows of the weight in order, some at a time: as many as take ``nbytes`` in float32, at least one.

    A weight whose rows cannot be had alone comes whole. Scalars come as they are.
    """
    import torch

    if not weight.by_rows:
        yield weight.read()
        return
    step = max(1, nbytes // (max(1, math.prod(weight.shape[1:])) * torch.float32.itemsize))
    for start in range(0, weight.shape[0], step):
        yield weight.read_rows(start, min(start + step, weight.shape[0]))


def read_into(out: torch.Tensor, weight: Weight) -> None:
    """``out``, of its shape, has the values of the weight, read some rows at a time."""
    if not weight.by_rows:
        out.copy_(weight.read())
        return
    start = 0
    for piece in pieces(weight):
        out[start : start + len(piece)].copy_(piece)
        start += len(piece)


def torch_dtype_name(weight: Weight) -> str:
    """Return torch's name of the weight's dtype, ``bfloat16`` for a stored ``BF16``."""
    return DTYPES[weight.dtype][0] if isinstance(weight, Stored) else weight.dtype


def emitted_bytes(weight: Weight) -> int:
    """Return the bytes of the weight as it is read."""
    import torch

    size: int = getattr(torch, torch_dtype_name(weight)).itemsize
    return math.prod(weight.shape) * size


def cast(weight: Weight, dtype: str) -> Weight:
    """Return the weight in ``dtype`` (torch's name); itself where it already is."""
    import torch

    if torch_dtype_name(weight) == dtype:
        return weight
    target = getattr(torch, dtype)
    return Derived((weight,), f"cast({dtype})", lambda tensor: tensor.to(target), dtype, weight.shape, acts="each row")


def narrowed_scale(weight: Weight, dtype: str) -> Derived:
    """Return the scales of integers in a narrower type, none of them 0."""
    import torch

    from calque.quantization import narrow_scale

    narrow = partial(narrow_scale, dtype=getattr(torch, dtype))
    return Derived((weight,), f"narrow_scale({dtype})", narrow, dtype, weight.shape, acts="each row")


def rounded(weight: Weight, dtype: str, computed: bool = True) -> Weight:
    """Return the weight in ``dtype``; what is computed of weights is computed of rounded ones, and rounded itself if ``computed``."""
    if isinstance(weight, Derived) and not weight.moved:
        done = f" of {dtype}"
        if weight.sources and not weight.operation.endswith(done):
            sources = tuple(cast(cast(source, dtype), torch_dtype_name(source)) for source in weight.sources)
            weight = replace(weight, sources=sources, operation=weight.operation + done)
        if not computed:
            return weight
    return cast(weight, dtype)


def transpose(weight: Weight) -> Derived:
    """Return the matrix with its two axes swapped, contiguous: [out, in] -> [in, out]."""
    rows, columns = weight.shape
    return Derived((weight,), "transpose", lambda tensor: tensor.t().contiguous(), torch_dtype_name(weight), (columns, rows))


@dataclass
class WeightTable:
    """Every parameter of a traced model, by name, and where its bytes come from.

    Two names that hold the same ``Weight`` object are tied: they are one tensor and are emitted once.
    ``required`` maps each name the graph needs to its shape; ``unused`` lists checkpoint tensors that no parameter took.
    """

    entries: dict[str, Weight]
    required: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    available: tuple[str, ...] = ()
    origin: str = ""

    def __getitem__(self, name: str) -> Weight:
        return self.entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tied(self, name: str) -> list[str]:
        """Return the other names that share this parameter's weight."""
        weight = self.entries[name]
        return [other for other, entry in self.entries.items() if entry is weight and other != name]

    def distinct(self) -> list[Weight]:
        """Return every weight, tied ones once."""
        return list({id(weight): weight for weight in self.entries.values()}.values())

    def nbytes(self) -> int:
        """Return the bytes of all weights as they will be emitted, tied ones once."""
        return sum(map(emitted_bytes, self.distinct()))

    def check(self) -> None:
        """Leave quietly if the ledger balances: every parameter has bytes of its shape, every tensor has a use.

        Raises:
            WeightMismatch: all that does not balance, with the nearest name in the checkpoint.
        """
        missing = [
            f"{name}  {list(shape)}  not in the checkpoint{_nearest(name, self.unused or self.available)}"
            for name, shape in self.required.items()
            if name not in self.entries
        ]
        misfits = [
            f"{name}  {list(shape)}  the checkpoint holds {list(self.entries[name].shape)}"
            for name, shape in self.required.items()
            if name in self.entries and self.entries[name].shape != shape
        ]
        unused = [f"{name}  in the checkpoint, used by no parameter" for name in self.unused]
        if missing or misfits or unused:
            counts = [
                f"{len(missing)} of {len(self.required)} parameters have no bytes" if missing else "",
                f"{len(misfits)} parameters have another shape" if misfits else "",
                f"{len(unused)} checkpoint tensors have no use" if unused else "",
            ]
            raise WeightMismatch(
                f"{', '.join(filter(None, counts))} in {self.origin}",
                [*missing, *misfits, *unused],
                "check that config.json and the weights belong together, and that every shard is there",
            )


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; nearest name: {close[0]}" if close else ""
