"""Some rows of a weight read alone are those of the whole, and large weights are never whole in memory."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from calque.checkpoint import read_headers
from calque.packing import pack
from calque.quantization import Quantized, Scheme, dequantize, quantize
from calque.quantized_weight import QuantizedWeight, numbers_of
from calque.targets._to_onnx import _InPieces
from calque.weights import Derived, Stored, Weight, cast, pieces, transpose

ROWS, COLUMNS = 96, 64
E4M3 = Scheme(8, 0, search=False, format="e4m3")


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Stored]:
    torch.manual_seed(0)
    save_file({name: torch.randn(ROWS, COLUMNS).to(torch.bfloat16) for name in ("one", "other")}, tmp_path / "model.safetensors")
    return read_headers(tmp_path)


def stack(*weights: Weight) -> Derived:
    rows = sum(weight.shape[0] for weight in weights)
    return Derived(tuple(weights), "stack", lambda *parts: torch.cat(parts), "float32", (rows, COLUMNS), acts="stacks")


def test_rows_of_a_cast_weight_are_those_of_the_whole(stored: dict[str, Stored]) -> None:
    weight = cast(stored["one"], "float32")
    assert weight.by_rows
    assert torch.equal(weight.read_rows(10, 37), weight.read()[10:37])


def test_rows_of_stacked_weights_cross_from_one_to_the_next(stored: dict[str, Stored]) -> None:
    weight = stack(cast(stored["one"], "float32"), cast(stored["other"], "float32"))
    assert torch.equal(weight.read_rows(90, 100), weight.read()[90:100])
    assert torch.equal(torch.cat(list(pieces(weight, 5 * COLUMNS * 4))), weight.read())


def test_rows_of_a_transposed_weight_are_cut_from_the_whole(stored: dict[str, Stored]) -> None:
    weight = transpose(stored["one"])
    assert not weight.by_rows
    assert torch.equal(weight.read_rows(3, 9), weight.read()[3:9])
    assert len(list(pieces(weight, COLUMNS))) == 1


def test_rows_of_a_view_of_a_pickle_are_cut_from_the_whole(stored: dict[str, Stored]) -> None:
    one = stored["one"]
    view = Stored(one.file, one.offset, one.nbytes, one.dtype, (COLUMNS, ROWS), (1, COLUMNS))
    assert torch.equal(view.read_rows(5, 7), one.read().t()[5:7])


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 16, symmetric=False), Scheme(8, 0, search=False), E4M3], ids=str)
def test_integers_in_pieces_are_those_of_the_whole(scheme: Scheme, stored: dict[str, Stored]) -> None:
    whole = {name: part.read() for name, part in QuantizedWeight.nearest(stored["one"], scheme).parts().items()}
    quantized = QuantizedWeight.nearest(stored["one"], scheme)
    for name, part in quantized.parts().items():
        assert torch.equal(octets(torch.cat(list(pieces(part, 7 * COLUMNS * 4)))), octets(whole[name])), name
    floats = QuantizedWeight.nearest(stored["one"], scheme).dequantized()
    assert torch.equal(floats.read_rows(11, 50), floats.read()[11:50])


@pytest.mark.parametrize("scheme", [Scheme(4, 16, symmetric=False), Scheme(8, 0), E4M3], ids=str)
def test_integers_are_made_once_however_often_and_in_whatever_pieces_they_are_read(scheme: Scheme, stored: dict[str, Stored]) -> None:
    reads: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        reads.append((start, stop))
        return stored["one"].read_rows(start, stop)

    counted = Derived((), "counted", partial(rows, 0, ROWS), "bfloat16", (ROWS, COLUMNS), rows=rows)
    quantized, expected = QuantizedWeight.nearest(counted, scheme), quantize(stored["one"].read(), scheme)
    floats = quantized.dequantized()
    assert torch.equal(floats.read_rows(8, 40), dequantized(expected, scheme)[8:40])
    first = list(reads)
    for name, part in quantized.parts().items():
        assert torch.equal(octets(part.read_rows(10, 30)), octets(getattr(expected, name)[10:30])), name
        assert part.read_rows(10, 30).dtype == getattr(expected, name).dtype
    assert reads == first
    assert torch.equal(floats.read(), dequantized(expected, scheme))
    made = len(reads)
    assert torch.equal(torch.cat(list(pieces(floats, 7 * COLUMNS * 4))), dequantized(expected, scheme))
    assert len(reads) == made


def octets(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor; torch compares no numbers of 8 bits."""
    return tensor.contiguous().view(torch.uint8)


def test_numbers_of_a_table_are_read_some_rows_at_a_time(stored: dict[str, Stored]) -> None:
    scheme = Scheme(4, 16, symmetric=False)
    made = QuantizedWeight.nearest(stored["one"], scheme)
    table = numbers_of(*made.parts().values(), group=16)
    assert table.by_rows
    assert torch.equal(torch.cat(list(pieces(table, 7 * COLUMNS * 4))), made.dequantized().read())


def dequantized(made: Quantized, scheme: Scheme) -> torch.Tensor:
    return dequantize(made.q, made.scale, made.zero_point, scheme.group)


def test_scales_read_in_another_order_are_those_of_the_same_rows(stored: dict[str, Stored]) -> None:
    parts = QuantizedWeight.nearest(stored["one"], Scheme()).parts()
    scale = parts["scale"].read()
    parts["q"].read_rows(40, 60)
    assert torch.equal(parts["scale"].read_rows(40, 60), scale[40:60])
    parts["q"].read_rows(0, 30)
    assert torch.equal(parts["scale"].read_rows(20, 60), scale[20:60])


def test_floats_that_rows_say_nothing_of_are_quantized_whole(stored: dict[str, Stored]) -> None:
    part = QuantizedWeight.nearest(transpose(stored["one"]), Scheme(4, 32)).parts()["q"]
    assert not part.by_rows
    assert part.read_rows(2, 5).shape == (3, ROWS)


def test_packed_weight_is_written_in_pieces_with_the_bytes_of_the_whole(tmp_path: Path) -> None:
    rows, columns, group = 40_000, 256, 32
    save_file({"large": torch.randn(rows, columns).to(torch.bfloat16)}, tmp_path / "model.safetensors")
    q = QuantizedWeight.nearest(read_headers(tmp_path)["large"], Scheme(4, group)).parts()["q"]
    function = partial(pack, bits=4, group=group)
    packed = Derived((q,), "pack", function, "uint8", (rows, columns // group, group // 2), moved=False, acts="each row")
    file = Counting()
    _InPieces("large", packed, ir.DataType.UINT8).tofile(file)
    assert file.writes == 2
    assert file.getvalue() == packed.read().numpy().tobytes()


class Counting(io.BytesIO):
    """A file that counts how often it is written to."""

    writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        return super().write(data)
