"""Where the tensors of a pickled checkpoint lie: found by torch's loader for weights alone; no byte of a tensor is read, no code runs."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.errors import SourceUnreadable
from calque.unreadable import LFS_FIX, LFS_POINTER
from calque.weights import DTYPES, Stored

if TYPE_CHECKING:
    import torch

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

AGAIN_FIX = "fetch the file again; it was cut short, altered, or is no file of torch.save"
RESAVE_FIX = (
    "resave it once, as an archive: python -c \"import torch; torch.save(torch.load('FILE', weights_only=True), 'NEW')\", "
    "then put NEW in its place"
)
DISTRUST_FIX = "load it by no other way either; ask its publisher for safetensors"

# The first bytes of the archives that torch.save writes since 1.6, and of the pickles that it wrote before.
ARCHIVE, PICKLE = b"PK\x03\x04", b"\x80"
# A local header of the zip format: 30 bytes, then the name and extra field whose lengths stand at its bytes 26 and 28.
HEADER, LENGTHS = 30, 26


def read_pickled(path: Path) -> dict[str, Stored]:
    """Return where each tensor of one file of ``torch.save`` lies, by name; errors do not name the file, their reader does.

    torch unpickles it with ``weights_only``, which knows tensors and plain containers and refuses all else before any of
    it is called; storages are mapped and stay untouched. Each tensor is then read by itself, like those of safetensors.

    Raises:
        SourceUnreadable: no such file, truncated, the format of before torch 1.6, or more than tensors by name.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise SourceUnreadable("is a Git-LFS pointer, not the file it stands for", fix=LFS_FIX)
        if start.startswith(PICKLE):
            raise SourceUnreadable("is of the format before torch 1.6, which cannot be mapped", fix=RESAVE_FIX)
        if not start.startswith(ARCHIVE):
            raise SourceUnreadable("is no file of torch.save", fix=AGAIN_FIX)
        storages = _storages(path)
    except OSError as error:
        raise SourceUnreadable(f"cannot be read: {error.strerror}", fix="check that the file is readable") from error
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as error:  # all of them raised by zipfile
        raise SourceUnreadable(f"is truncated or altered: {error or type(error).__name__}", fix=AGAIN_FIX) from error
    loaded = _unpickle(path)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise SourceUnreadable(f"holds a {type(loaded).__name__}, not tensors by name", fix="save the model's state_dict() alone")
    found = {name: _placed(value, path.resolve(), storages) for name, value in loaded.items()}
    if faults := [f"{name!r} {entry}" for name, entry in found.items() if isinstance(entry, str)]:
        raise SourceUnreadable("holds more than plain tensors", faults, "save the model's state_dict() alone")
    return {name: entry for name, entry in found.items() if isinstance(entry, Stored)}


def _storages(path: Path) -> dict[int, int]:
    """Return the bytes of each of the archive's entries, by where its content begins in the file."""
    storages = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise SourceUnreadable("is compressed, so that it cannot be mapped", fix=RESAVE_FIX)
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise SourceUnreadable("was saved on a big-endian machine", fix=RESAVE_FIX)
            file.seek(entry.header_offset + LENGTHS)
            name, extra = int.from_bytes(file.read(2), "little"), int.from_bytes(file.read(2), "little")
            start = entry.header_offset + HEADER + name + extra
            if start + entry.file_size > path.stat().st_size:
                raise zipfile.BadZipFile(f"{entry.filename!r} ends outside the file")
            storages[start] = entry.file_size
    return storages


def _unpickle(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an archive of TorchScript, which is refused below
            return torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        asks = f"asks for {asked[1]}" if asked else "builds what is no tensor"
        what = f"is refused: it {asks}, and loading that could run code; nothing of it was run"
        raise SourceUnreadable(what, fix=DISTRUST_FIX) from error
    except Exception as error:  # torch's reader raises whatever a malformed pickle makes it stumble over
        first = str(error).partition("\n")[0]
        raise SourceUnreadable(f"cannot be loaded: {type(error).__name__}: {first}", fix=AGAIN_FIX) from error


def _placed(value: object, path: Path, storages: Mapping[int, int]) -> Stored | str:
    """Return where the tensor's bytes lie, or what is wrong with it."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__name__}"
    assert isinstance(value, torch.Tensor)
    dtype = _dtypes().get(str(value.dtype))
    if dtype is None or value.layout != torch.strided or value.is_neg():
        return f"is a {value.layout} tensor of {value.dtype}, known are strided ones of {' '.join(DTYPES)}"
    shape = tuple(value.shape)
    if value.numel() == 0:
        return Stored(path, 0, 0, dtype, shape)
    begin, nbytes = _span(value)
    # torch derives where a storage lies from those before it, so what it says is held against the archive's own list.
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if start is None or begin + nbytes > storages.get(start, -1):
        return "lies outside the archive's entries"
    return Stored(path, start + begin, nbytes, dtype, shape, None if value.is_contiguous() else value.stride())


def _span(value: torch.Tensor) -> tuple[int, int]:
    """Return where the tensor's first element lies in its storage, and the bytes from there to the end of its last."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return int(value.storage_offset()) * value.itemsize, elements * value.itemsize


def _dtypes() -> dict[str, str]:
    return {f"torch.{name}": dtype for dtype, (name, _) in DTYPES.items()}
