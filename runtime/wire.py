"""Reads protobuf's wire format without its package: the fields of a message by their numbers.

Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and value of each field: a whole number, or the bytes of anything else.

    Raises:
        ValueError: no message is written so.
        IndexError: it ends in the middle of a number.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == VARINT:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if key & 7 == LENGTH:
            size, place = _varint(data, place)
        elif key & 7 in (EIGHT_BYTES, FOUR_BYTES):
            size = 8 if key & 7 == EIGHT_BYTES else 4
        else:
            raise ValueError(f"no field begins with {key}")
        if place + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, data[place : place + size]
        place += size


def parts(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Yield the bytes of each field of a number."""
    return (value for number, value in fields(data) if number == wanted and not isinstance(value, int))


def text(value: int | memoryview) -> str:
    """Return the text of a field."""
    if isinstance(value, int):
        raise ValueError("a number stands where a name is expected")
    return bytes(value).decode("utf-8")


def varints(data: memoryview) -> list[int]:
    """Return the whole numbers of a packed field."""
    found, place = [], 0
    while place < len(data):
        value, place = _varint(data, place)
        found.append(value)
    return found


def signed(value: int) -> int:
    """Return the number that an int32 or int64 field holds; negative ones are written as 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return the whole number at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
