"""Where a checkpoint's tensors lie: safetensors headers, read and checked, or pickles; never a tensor, torch only for pickles."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from calque import pickled, unreadable
from calque.artifact import file_sha256
from calque.errors import SourceUnreadable
from calque.weights import DTYPES, Stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A whole checkpoint in one file, and the index of one in several, the format that wins first; as transformers looks them up.
FORMATS = ((SINGLE, INDEX), (pickled.SINGLE, pickled.INDEX))
WANTED = tuple(name for pair in FORMATS for name in pair)

# The format's own limit, and the most axes and the longest axis that torch can hold.
MAX_HEADER = 100_000_000
MAX_RANK = 64
MAX_EXTENT = 2**63 - 1

AGAIN_FIX = "fetch the file again; it was cut short, altered, or is no safetensors file"
JSON_FIX = "fetch the file again, or correct it: it must hold one JSON object"


def read_headers(folder: Path) -> dict[str, Stored]:
    """Return where each tensor of the checkpoint in ``folder`` lies, by name; only headers and pickles have been read.

    The checkpoint is ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names, or the same of
    ``pytorch_model.bin``; the first of them wins, as in transformers. Files are resolved, so that links (the hub's cache)
    may change afterwards.

    Raises:
        SourceUnreadable: no checkpoint, or a file or the index is truncated, malformed or incomplete; every offender.

    Source: safetensors format, README@0.8.
    """
    files = weight_files(folder)
    placed: dict[str, list[str]] = {name: [] for name in files}
    if index := _index(folder):
        for tensor, shard in _weight_map(folder / index).items():
            placed[shard].append(tensor)
    read = pickled.read_pickled if _is_pickled(folder) else _read_file
    tensors: dict[str, Stored] = {}
    holder: dict[str, str] = {}
    problems: list[str] = []
    fix = AGAIN_FIX
    for name, path in files.items():
        if not path.is_file():
            problems.append(f"{name}  missing" + (f"; the index places {len(placed[name])} tensors in it" if placed[name] else ""))
            continue
        try:
            found = read(path)
        except SourceUnreadable as error:
            problems += [f"{name}  {line}" for line in (error.where or (error.what,))]
            fix = error.fix
            continue
        problems += [f"{_shown(tensor)}  in {holder[tensor]} and in {name}" for tensor in found if tensor in holder]
        problems += [f"{_shown(tensor)}  not in {name}, where the index places it" for tensor in placed[name] if tensor not in found]
        holder.update(dict.fromkeys(found, name))
        tensors.update(found)
    if problems:
        raise SourceUnreadable(f"the checkpoint in {folder} cannot be read", problems, fix)
    return tensors


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the checkpoint's files by their name within ``folder``, sorted; those of an index may be missing.

    Raises:
        SourceUnreadable: no checkpoint, or an index that is malformed or names files outside the folder.
    """
    name = _chosen(folder)
    if name is None:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise unreadable.no_weights(names, str(folder), WANTED)
    if _index(folder):
        return {shard: folder / shard for shard in sorted(set(_weight_map(folder / name).values()))}
    return {name: folder / name}


def sha256(folder: Path) -> str:
    """Return the content's hex SHA-256: that of ``sha256sum config.json <weight files, sorted>``, so no path enters it.

    Raises:
        SourceUnreadable: no checkpoint in the folder, an unusable index, or a file that cannot be read.
    """
    files = {"config.json": folder / "config.json", **weight_files(folder)}
    try:
        lines = "".join(f"{file_sha256(path)}  {name}\n" for name, path in files.items())
    except OSError as error:
        fix = "check that the file is there and readable"
        raise SourceUnreadable(f"{error.filename} cannot be read: {error.strerror}", fix=fix) from error
    return hashlib.sha256(lines.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that the file holds.

    Raises:
        SourceUnreadable: unreadable, a Git-LFS pointer, not UTF-8, not JSON, or not an object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceUnreadable(f"{path} cannot be read: {error.strerror}", fix="check that the file is there and readable") from error
    if data.startswith(unreadable.LFS_POINTER):
        raise SourceUnreadable(f"{path} is a Git-LFS pointer, not the file it stands for", fix=unreadable.LFS_FIX)
    return _json_object(data, str(path), JSON_FIX)


def _json_object(data: bytes, where: str, fix: str = AGAIN_FIX) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a key occurs twice")
        return entries

    try:
        # A hostile file nests brackets until the parser gives up.
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise SourceUnreadable(f"{where} is not JSON: {error}", fix=fix) from error
    if not isinstance(value, dict):
        raise SourceUnreadable(f"{where} holds a {type(value).__name__}, not a JSON object", fix=fix)
    return value


def _chosen(folder: Path) -> str | None:
    """Return the name of the file or index that stands for the checkpoint, None if there is none."""
    # A link that leads nowhere counts: what it leads to is missing, which says more than that there is no checkpoint.
    return next((name for name in WANTED if (folder / name).is_file() or (folder / name).is_symlink()), None)


def _index(folder: Path) -> str | None:
    chosen = _chosen(folder)
    return chosen if chosen in [index for _, index in FORMATS] else None


def _is_pickled(folder: Path) -> bool:
    return _chosen(folder) in FORMATS[1]


def _weight_map(path: Path) -> dict[str, str]:
    """Return the index: the name of the shard that each tensor lies in.

    A shard is a plain file name: an index is data from strangers, and must not make us read elsewhere. What a name links
    to is the owner's affair; the hub's cache is made of links.
    """
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise SourceUnreadable(f"{path} has no weight_map that places tensors in files", fix=AGAIN_FIX)
    shards = list({str(shard): shard for shard in table.values()}.values())
    outside = [shard for shard in shards if not isinstance(shard, str) or not _is_inside(shard)]
    if outside:
        lines = [f"{_shown(shard)}  not the name of a file inside the folder" for shard in outside]
        raise SourceUnreadable(f"{path} names files that it must not", lines, "fetch the model from a source you trust")
    return table


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name and ":" not in name


def _read_file(path: Path) -> dict[str, Stored]:
    """Return where the tensors of one safetensors file lie; errors do not name the file, their reader does."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(unreadable.LFS_POINTER))
            length = int.from_bytes(start[:8], "little")
            if start == unreadable.LFS_POINTER:
                raise SourceUnreadable("is a Git-LFS pointer, not the file it stands for", fix=unreadable.LFS_FIX)
            if size < 8:
                raise SourceUnreadable(f"is truncated: {size} bytes, less than the 8 that hold the header's length", fix=AGAIN_FIX)
            if length > MAX_HEADER:
                raise SourceUnreadable(f"claims a header of {length} bytes, more than the format allows", fix=AGAIN_FIX)
            if 8 + length > size:
                raise SourceUnreadable(f"is truncated: it claims a header of {length} bytes and has {size} in all", fix=AGAIN_FIX)
            file.seek(8)
            header = _json_object(file.read(length), "its header")
    except OSError as error:
        raise SourceUnreadable(f"cannot be read: {error.strerror}", fix="check that the file is readable") from error
    header.pop("__metadata__", None)
    return _located(path.resolve(), header, 8 + length, size)


def _located(path: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, Stored]:
    """Return the header's tensors once each fits its shape and together they fill the file from ``data`` to ``size``."""
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for name, entry in header.items():
        if fault := _fault(entry):
            problems.append(f"{_shown(name)}  {fault}")
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = Stored(path, data + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    position = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        end = tensor.offset + tensor.nbytes
        if end > size:
            problems.append(f"{_shown(name)}  ends at byte {end}; the file has {size}")
        elif tensor.offset < position:
            problems.append(f"{_shown(name)}  begins at byte {tensor.offset}, inside another tensor that ends at {position}")
        elif tensor.offset > position and not problems:
            problems.append(f"{_shown(name)}  begins at byte {tensor.offset}; the {tensor.offset - position} bytes before belong to none")
        position = max(position, end)
    if position < size and not problems:
        problems.append(f"the last {size - position} bytes belong to no tensor")
    if len(cut := [line for line in problems if "; the file has " in line]) == len(problems) > 1:
        # A download that broke off: how far it came says more than each tensor that is missing.
        problems = [f"its tensors take {position} bytes, the file has {size}: {len(cut)} of {len(tensors)} are cut off"]
    if problems:
        raise SourceUnreadable("has a header that does not fit the file", problems, AGAIN_FIX)
    return tensors


def _fault(entry: object) -> str | None:
    """Return what is wrong with one header entry by itself, None if nothing is."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"has dtype {_shown(dtype)}; known are {' '.join(DTYPES)}"
    # `type(…) is int`, for JSON's true is an int to isinstance.
    if not isinstance(shape, list) or len(shape) > MAX_RANK or any(type(n) is not int or not 0 <= n <= MAX_EXTENT for n in shape):
        return f"has shape {_shown(shape)}, not a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets) or not 0 <= offsets[0] <= offsets[1]:
        return f"has data_offsets {_shown(offsets)}, not a begin and an end"
    needed = math.prod(shape) * DTYPES[dtype][1]
    if needed != offsets[1] - offsets[0]:
        return f"has {offsets[1] - offsets[0]} bytes; {dtype} {_shown(shape)} takes {needed}"
    return None


def _shown(value: object) -> str:
    """Return the value as it may be printed: on one line, without control characters, short."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 120 else text[:119] + "…"
