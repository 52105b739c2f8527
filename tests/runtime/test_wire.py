from __future__ import annotations

import pytest

from calque.runtime.wire import fields, parts, signed, text, varints


def test_fields_are_read_by_their_numbers() -> None:
    # Field 1: 300; field 2: "ab"; field 3: four bytes; field 500: eight bytes.
    data = memoryview(b"\x08\xac\x02\x12\x02ab\x1d\x01\x02\x03\x04\xa1\x1f12345678")
    found = [(number, value if isinstance(value, int) else bytes(value)) for number, value in fields(data)]
    assert found == [(1, 300), (2, b"ab"), (3, b"\x01\x02\x03\x04"), (500, b"12345678")]
    assert [text(part) for part in parts(data, 2)] == ["ab"]


def test_negative_numbers_take_ten_bytes() -> None:
    assert [signed(number) for number in varints(memoryview(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x05\xac\x02"))] == [-1, 5, 300]


@pytest.mark.parametrize("data", [b"\x08", b"\x08\x80", b"\x12\x05ab", b"\x0b", b"\x1d\x01"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        list(fields(memoryview(data)))


def test_a_number_is_no_text() -> None:
    with pytest.raises(ValueError, match="a number stands where a name is expected"):
        text(5)
