"""Numbers become integers and numbers again."""

from __future__ import annotations

import pytest
import torch

from calque.packing import pack, pack_zero_points, unpack, unpacked_weight
from calque.quantization import LARGEST_E4M3, Scheme, bounds, dequantize, narrow_scale, quantize, round_e4m3
from calque.quantized_weight import QuantizedWeight, with_scales
from calque.weights import Derived, Weight, transpose


def weight(rows: int = 24, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def held(tensor: torch.Tensor) -> Derived:
    return Derived((), "given", lambda: tensor, "float32", tuple(tensor.shape))


def error(tensor: torch.Tensor, scheme: Scheme) -> float:
    made = quantize(tensor, scheme)
    return float((dequantize(made.q, made.scale, made.zero_point, scheme.group) - tensor).square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 16, 32, 128])
def test_every_number_is_within_half_a_step_without_a_search(bits: int, group: int, symmetric: bool) -> None:
    scheme = Scheme(bits, group, symmetric, search=False)  # type: ignore[arg-type]
    tensor = weight()
    made = quantize(tensor, scheme)
    low, high = bounds(bits)
    assert made.q.dtype == torch.int8
    assert made.q.min() >= low
    assert made.q.max() <= high
    assert (made.scale > 0).all()
    steps = made.scale.repeat_interleave(group or 128, 1)
    off = (dequantize(made.q, made.scale, made.zero_point, group) - tensor).abs()
    # A zero point is rounded itself, which moves the ends of the range by as much.
    assert (off <= steps * (0.5 if symmetric else 1.0) * 1.001).all()


def test_rows_of_zeros_stay_zeros() -> None:
    for symmetric in (True, False):
        made = quantize(torch.zeros(2, 32), Scheme(4, 32, symmetric))
        assert not dequantize(made.q, made.scale, made.zero_point, 32).any()


def test_the_search_never_makes_it_worse_and_mostly_better() -> None:
    for symmetric in (True, False):
        plain, searched = (error(weight(), Scheme(4, 32, symmetric, search)) for search in (False, True))
        assert searched < 0.97 * plain


def test_zero_points_help_where_numbers_lie_on_one_side() -> None:
    shifted = weight() + 3
    assert error(shifted, Scheme(4, 32, symmetric=False)) < 0.5 * error(shifted, Scheme(4, 32))


def test_importance_moves_the_error_to_what_counts_less() -> None:
    tensor = weight()
    counts = torch.ones(128)
    counts[::2] = 100.0
    plain, weighted = (quantize(tensor, Scheme(4, 32), counted) for counted in (None, counts))
    errors = [(dequantize(made.q, made.scale, None, 32) - tensor).square().mean(0)[::2].mean() for made in (plain, weighted)]
    assert errors[1] < errors[0]


def test_integers_do_not_depend_on_how_many_rows_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize(weight(), Scheme(4, 32, symmetric=False))
    monkeypatch.setattr("calque.quantization.PIECE", 128)
    apart = quantize(weight(), Scheme(4, 32, symmetric=False))
    assert torch.equal(whole.q, apart.q)
    assert torch.equal(whole.scale, apart.scale)
    assert whole.zero_point is not None
    assert apart.zero_point is not None
    assert torch.equal(whole.zero_point, apart.zero_point)


@pytest.mark.parametrize(("size", "group"), [(576, 64), (96, 32), (48, 16), (2048, 128), (40, None), (33, None)])
def test_groups_divide_the_row(size: int, group: int | None) -> None:
    fitted = Scheme(4, 128).fitted(size)
    assert (fitted.group if fitted else None) == group


def test_a_weight_is_quantized_once_for_all_its_parts() -> None:
    reads = []

    def read() -> torch.Tensor:
        reads.append(1)
        return weight()

    source: Weight = Derived((), "given", read, "float32", (24, 128))
    made = QuantizedWeight.nearest(source, Scheme(4, 32, symmetric=False)).parts()
    q, scale, zero_point = (made[part].read() for part in ("q", "scale", "zero_point"))
    assert len(reads) == 1
    expected = quantize(weight(), Scheme(4, 32, symmetric=False))
    assert torch.equal(q, expected.q)
    assert torch.equal(scale, expected.scale)
    assert expected.zero_point is not None
    assert torch.equal(zero_point, expected.zero_point)


def test_what_the_integers_stand_for_is_the_weight_that_replaces_it() -> None:
    made = QuantizedWeight.nearest(held(weight()), Scheme(8, 0))
    parts = {name: part.read() for name, part in made.parts().items()}
    assert torch.equal(made.dequantized().read(), dequantize(parts["q"], parts["scale"], None, 0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 64])
def test_packed_integers_are_the_same_when_unpacked(bits: int, group: int) -> None:
    made = quantize(weight(), Scheme(bits, group, symmetric=False))  # type: ignore[arg-type]
    assert made.zero_point is not None
    packed, zero_points = pack(made.q, bits, group), pack_zero_points(made.zero_point, bits)
    assert packed.shape == (24, 128 // group, group * bits // 8)
    assert torch.equal(unpack(packed, bits, 128), made.q)
    assert torch.equal(unpack(zero_points, bits, 128 // group), made.zero_point)
    expected = dequantize(made.q, made.scale, made.zero_point, group)
    assert torch.equal(unpacked_weight(packed, made.scale, zero_points, bits, group), expected)


def test_the_first_of_two_integers_is_the_low_half_of_a_byte() -> None:
    q = torch.tensor([[-8, 7, *[0] * 14]], dtype=torch.int8)
    assert pack(q, 4, 16)[0, 0, :2].tolist() == [0xF0, 0x88]


def test_an_odd_number_of_zero_points_ends_in_half_a_byte() -> None:
    zero_points = torch.tensor([[1, -8, 7]], dtype=torch.int8)
    packed = pack_zero_points(zero_points, 4)
    assert packed.shape == (1, 2)
    assert torch.equal(unpack(packed, 4, 3), zero_points)


E4M3 = Scheme(8, 0, search=False, format="e4m3")


def test_e4m3_keeps_four_binary_digits_of_every_number_and_the_largest_of_a_row_exactly() -> None:
    tensor = weight() * torch.logspace(-6, 4, 24)[:, None]
    made = quantize(tensor, E4M3)
    assert (made.q.dtype, made.zero_point, str(E4M3)) == (torch.float8_e4m3fn, None, "fp8")
    q, back = made.q.to(torch.float32), dequantize(made.q, made.scale, None, 0)
    assert q.isfinite().all()
    assert torch.equal(q.abs().amax(1), torch.full((24,), LARGEST_E4M3))
    # Half of the last of four digits; below the smallest normal number, 2^-6, digits are of fixed size.
    allowed = torch.maximum(tensor.abs() * 2**-4, made.scale * 2**-10) * 1.001
    assert ((back - tensor).abs() <= allowed).all()
    assert ((back - tensor).abs() > tensor.abs() * 2**-6).any()


def test_e4m3_of_rows_of_zeros_has_scale_one_and_what_lies_outside_is_the_largest() -> None:
    made = quantize(torch.zeros(2, 32), E4M3)
    assert torch.equal(made.scale, torch.ones(2, 1))
    assert not dequantize(made.q, made.scale, None, 0).any()
    assert round_e4m3(torch.tensor([1e6, -449.0, 447.0, 0.3])).tolist() == [448.0, -448.0, 448.0, 0.3125]


def test_scales_in_a_narrower_type_are_never_zero() -> None:
    scale = torch.tensor([[1e-12], [3e-4], [1.0], [1e9]])
    narrow = narrow_scale(scale, torch.float16)
    assert narrow.dtype == torch.float16
    assert narrow.flatten().tolist() == [2.0**-24, float(torch.tensor(3e-4).half()), 1.0, 65504.0]


@pytest.mark.parametrize("scheme", [E4M3, Scheme(8, 0, search=False), Scheme(4, 32, symmetric=False)], ids=str)
def test_what_integers_stand_for_follows_their_scales(scheme: Scheme) -> None:
    made = quantize(weight(), scheme)
    held_weight = QuantizedWeight.nearest(held(weight()), scheme)
    numbers = transpose(held_weight.dequantized())
    narrow = with_scales(numbers, torch.float16)
    expected = dequantize(made.q, made.scale.half().float(), made.zero_point, scheme.group)
    assert torch.equal(narrow.read(), expected.t())
    assert not torch.equal(numbers.read(), narrow.read())
    assert with_scales(held(weight()), torch.float16).read().equal(weight())
