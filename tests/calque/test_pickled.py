from __future__ import annotations

import os
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from calque.checkpoint import read_headers, sha256, weight_files
from calque.converters import causal_lm
from calque.errors import SourceUnreadable
from calque.pickled import INDEX, SINGLE, read_pickled
from calque.source import ModelSource
from tests.tiny_checkpoints import as_pickle, tensors_of, write_llama


class Payload:
    """Unpickled by a loader that is not careful, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def refusal(path: Path) -> SourceUnreadable:
    with pytest.raises(SourceUnreadable) as caught:
        read_pickled(path)
    assert caught.value.exit_code == 7
    assert caught.value.fix
    return caught.value


def test_every_tensor_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    weight, larger = torch.randn(4, 6), torch.randn(10, 10)
    tensors = OrderedDict(
        plain=weight,
        tied=weight,
        transposed=weight.t(),
        cut_out=larger[2:5, 3:7],
        expanded=torch.ones(1).expand(4),
        empty=torch.empty(0, 3),
        scalar=torch.tensor(2.5),
        parameter=torch.nn.Parameter(torch.randn(3)),
        half=torch.randn(3).bfloat16(),
        flags=torch.tensor([True, False]),
        eight_bits=torch.randn(4, 4).to(torch.float8_e4m3fn).t(),
    )
    torch.save(tensors, tmp_path / SINGLE)
    found = read_pickled(tmp_path / SINGLE)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name].read().view(-1).view(torch.uint8), tensor.detach().contiguous().view(-1).view(torch.uint8)), name
        assert found[name].shape == tuple(tensor.shape)
    assert found["plain"] == found["tied"]


def test_no_byte_of_a_tensor_is_in_memory_before_it_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 24)}, tmp_path / SINGLE)
    before = Path("/proc/self/statm").read_text().split()[1]
    stored = read_pickled(tmp_path / SINGLE)["a"]
    after = Path("/proc/self/statm").read_text().split()[1]
    assert stored.nbytes == 1 << 26
    assert (int(after) - int(before)) * os.sysconf("SC_PAGE_SIZE") < stored.nbytes // 2


@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoint_of_pickles_is_read_and_traced_as_that_of_safetensors(model: Path, tmp_path: Path, shards: int) -> None:
    expected = tensors_of(model)
    as_pickle(model, shards)
    source = ModelSource.resolve(str(model), scratch=tmp_path)
    assert len(weight_files(model)) == shards
    assert {name: torch.equal(stored.read(), expected[name]) for name, stored in source.tensors.items()} == dict.fromkeys(expected, True)
    causal_lm.trace(source).weights.check()
    state = source.load_eager().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_tied_head_that_a_pickle_names_twice_is_one_weight(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", tie_word_embeddings=True)
    tensors = tensors_of(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, model / SINGLE)
    (model / "model.safetensors").unlink()
    table = causal_lm.trace(ModelSource.resolve(str(model), scratch=tmp_path)).weights
    table.check()
    # The trace merges tied parameters under one name.
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & table.entries.keys()) == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors_win_where_both_exist(model: Path, tmp_path: Path, shards: int) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    as_pickle(copy, shards)
    for file in copy.glob("pytorch_model*"):
        shutil.copy(file, model)
    assert list(weight_files(model)) == ["model.safetensors"]
    assert {stored.file.name for stored in read_headers(model).values()} == {"model.safetensors"}


def test_content_hash_covers_pickles(model: Path) -> None:
    as_pickle(model)
    before = sha256(model)
    data = bytearray((model / SINGLE).read_bytes())
    data[len(data) // 2] ^= 1
    (model / SINGLE).write_bytes(data)
    assert sha256(model) != before


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code_is_refused_and_runs_none(model: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    (model / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2), "b": Payload(mark)}, model / SINGLE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceUnreadable) as caught:
        ModelSource.resolve(str(model), scratch=tmp_path)
    assert caught.value.exit_code == 7
    [where] = caught.value.where
    assert where.startswith(SINGLE)
    assert ("posix.system" in where) == zipped
    assert "publisher" in caught.value.fix if zipped else "weights_only=True" in caught.value.fix
    assert not mark.exists()
    # The payload is a working one.
    torch.load(model / SINGLE, weights_only=False)
    assert mark.exists()


def test_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(64.0), "b": torch.ones(3)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        refusal(tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refusal(tmp_path / "cut.bin").what


def test_altered_byte_is_read_within_the_file_or_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(8.0)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    refused = 0
    for position in range(0, len(whole), 3):
        (tmp_path / "altered.bin").write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            found = read_pickled(tmp_path / "altered.bin")
        except SourceUnreadable:
            refused += 1
            continue
        assert all(stored.offset + stored.nbytes <= len(whole) for stored in found.values())
    assert refused


def test_old_format_is_refused_with_a_command_that_mends_it(model: Path, tmp_path: Path) -> None:
    expected = tensors_of(model)
    torch.save(expected, model / SINGLE, _use_new_zipfile_serialization=False)
    refused = refusal(model / SINGLE)
    assert "before torch 1.6" in refused.what
    command = refused.fix.partition('python -c "')[2].partition('"')[0]
    exec(command.replace("FILE", str(model / SINGLE)).replace("NEW", str(tmp_path / "new.bin")))
    assert read_pickled(tmp_path / "new.bin").keys() == expected.keys()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.ones(2), "holds a Tensor, not tensors by name"),
        ({1: torch.ones(2)}, "holds a dict, not tensors by name"),
        ({"a": torch.ones(2), "epoch": 3}, "'epoch' is a int"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict' is a dict"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
    ],
)
def test_file_that_holds_more_than_tensors_by_name_is_refused(tmp_path: Path, content: object, said: str) -> None:
    torch.save(content, tmp_path / SINGLE)
    refused = refusal(tmp_path / SINGLE)
    assert said in "\n".join([refused.what, *refused.where])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no file of torch.save"),
        (b"<!DOCTYPE html>", "no file of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    ],
)
def test_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert said in refusal(tmp_path / SINGLE).what


def test_archive_that_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(64)}, tmp_path / SINGLE)
    rewritten: dict[str, tuple[int, dict[str, bytes]]] = {
        "compressed": (zipfile.ZIP_DEFLATED, {}),
        "big-endian": (zipfile.ZIP_STORED, {"byteorder": b"big"}),
    }
    for said, (compression, changes) in rewritten.items():
        with zipfile.ZipFile(tmp_path / SINGLE) as old, zipfile.ZipFile(tmp_path / "new.bin", "w", compression) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, changes.get(entry.filename.rpartition("/")[2], old.read(entry)))
        assert said in refusal(tmp_path / "new.bin").what


def test_archive_packed_anew_is_refused_not_read_from_elsewhere(tmp_path: Path) -> None:
    # Without torch's padding its storages lie elsewhere than torch reckons from their sizes alone.
    torch.save({"a": torch.arange(5.0), "b": torch.arange(7.0)}, tmp_path / SINGLE)
    with zipfile.ZipFile(tmp_path / SINGLE) as old, zipfile.ZipFile(tmp_path / "new.bin", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert "'b' lies outside the archive's entries" in refusal(tmp_path / "new.bin").where


def test_index_without_its_files_names_each(model: Path) -> None:
    as_pickle(model, shards=3)
    (model / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(SourceUnreadable) as caught:
        read_headers(model)
    [where] = caught.value.where
    assert where.startswith("pytorch_model-00002-of-00003.bin  missing; the index places")
    assert (model / INDEX).is_file()
