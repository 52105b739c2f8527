from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calque.checkpoint import read_headers
from calque.errors import SourceUnreadable, WeightMismatch
from calque.weights import Derived, Stored, WeightTable, cast, torch_dtype_name, transpose

TENSORS = {
    "float": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "bfloat": torch.arange(8, dtype=torch.float32).reshape(4, 2).to(torch.bfloat16) / 3,
    "half": torch.arange(4, dtype=torch.float16),
    "whole": torch.tensor([[-3], [2**40]]),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
    "eight": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Stored]:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return read_headers(tmp_path)


@pytest.mark.parametrize("name", TENSORS)
def test_read_gives_the_stored_tensor(name: str, stored: dict[str, Stored]) -> None:
    read = stored[name].read()
    assert read.dtype == TENSORS[name].dtype
    assert read.shape == TENSORS[name].shape
    assert torch.equal(
        read.view(torch.uint8) if name == "eight" else read, TENSORS[name].view(torch.uint8) if name == "eight" else TENSORS[name]
    )


def test_read_gives_a_copy_of_its_own(stored: dict[str, Stored]) -> None:
    first = stored["float"].read()
    first.zero_()
    assert torch.equal(stored["float"].read(), TENSORS["float"])


def test_file_that_became_shorter_is_reported_with_the_bytes_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(20))
    with pytest.raises(SourceUnreadable) as caught:
        Stored(path, 8, 16, "F32", (4,)).read()
    assert str(caught.value) == f"SourceUnreadable: {path} is truncated: it ends 4 bytes early\nFix: fetch the file again"


def test_tensor_without_elements_is_read_where_the_file_ends(tmp_path: Path) -> None:
    assert Stored(tmp_path / "absent", 0, 0, "BF16", (3, 0)).read().shape == (3, 0)


def test_cast_changes_the_dtype_and_says_so(stored: dict[str, Stored]) -> None:
    weight = cast(stored["bfloat"], "float32")
    assert isinstance(weight, Derived)
    assert (weight.operation, weight.dtype, weight.shape) == ("cast(float32)", "float32", (4, 2))
    assert torch.equal(weight.read(), TENSORS["bfloat"].float())


def test_cast_to_the_dtype_it_has_is_the_weight_itself(stored: dict[str, Stored]) -> None:
    assert cast(stored["bfloat"], "bfloat16") is stored["bfloat"]


def test_transpose_swaps_the_axes_and_lays_the_bytes_out(stored: dict[str, Stored]) -> None:
    weight = transpose(cast(stored["bfloat"], "float32"))
    read = weight.read()
    assert weight.shape == (2, 4)
    assert weight.dtype == "float32"
    assert read.is_contiguous()
    assert torch.equal(read, TENSORS["bfloat"].float().t())


def test_derived_weight_of_another_shape_than_declared_is_a_fault(stored: dict[str, Stored]) -> None:
    wrong = Derived((stored["float"],), "identity", lambda tensor: tensor, "float32", (3, 2))
    with pytest.raises(AssertionError, match=r"identity gave \(2, 3\), declared \(3, 2\)"):
        wrong.read()


def test_dtype_has_torchs_name(stored: dict[str, Stored]) -> None:
    assert torch_dtype_name(stored["bfloat"]) == "bfloat16"
    assert torch_dtype_name(cast(stored["bfloat"], "float16")) == "float16"


def test_bytes_count_tied_weights_once_and_derived_ones_as_emitted(stored: dict[str, Stored]) -> None:
    shared = cast(stored["bfloat"], "float32")
    table = WeightTable({"embed": shared, "head": shared, "norm": stored["half"]})
    assert table.nbytes() == 4 * 2 * 4 + 4 * 2
    assert table.tied("embed") == ["head"]
    assert table.tied("norm") == []


def test_equal_weights_under_two_objects_are_not_tied(stored: dict[str, Stored]) -> None:
    table = WeightTable({"one": cast(stored["bfloat"], "float32"), "two": cast(stored["bfloat"], "float32")})
    assert table.tied("one") == []
    assert table.nbytes() == 2 * 4 * 2 * 4


def test_ledger_that_balances_is_quiet(stored: dict[str, Stored]) -> None:
    WeightTable({"w": stored["float"]}, {"w": (2, 3)}, origin="org/name").check()


def test_ledger_lists_all_that_does_not_balance_with_the_nearest_name(stored: dict[str, Stored]) -> None:
    table = WeightTable(
        {"model.norm.weight": stored["half"], "model.embed.weight": stored["float"]},
        {"model.norm.weight": (5,), "model.embed.weight": (2, 3), "model.layers.0.up.weight": (6, 3), "zzz": (1,)},
        unused=("model.layers.0.upp.weight", "extra"),
        origin="org/name@abc",
    )
    with pytest.raises(WeightMismatch) as caught:
        table.check()
    assert str(caught.value) == (
        "WeightMismatch: 2 of 4 parameters have no bytes, 1 parameters have another shape, "
        "2 checkpoint tensors have no use in org/name@abc\n"
        "  model.layers.0.up.weight  [6, 3]  not in the checkpoint; nearest name: model.layers.0.upp.weight\n"
        "  zzz  [1]  not in the checkpoint\n"
        "  model.norm.weight  [5]  the checkpoint holds [4]\n"
        "  model.layers.0.upp.weight  in the checkpoint, used by no parameter\n"
        "  extra  in the checkpoint, used by no parameter\n"
        "Fix: check that config.json and the weights belong together, and that every shard is there"
    )
    assert caught.value.exit_code == 7


def test_nearest_name_is_sought_among_all_tensors_when_none_is_left_over() -> None:
    table = WeightTable({}, {"lm_head.weight": (4, 2)}, available=("lm_head.weights", "model.norm.weight"), origin="here")
    with pytest.raises(WeightMismatch, match=r"nearest name: lm_head\.weights"):
        table.check()
