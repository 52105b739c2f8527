from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from calque.checkpoint import INDEX, SINGLE, read_headers, read_json, sha256, weight_files
from calque.errors import SourceUnreadable

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(path: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def write_shards(folder: Path, shards: dict[str, list[str]], weight_map: dict[str, str] | None = None) -> None:
    for name, tensors in shards.items():
        save_file({tensor: torch.ones(2) for tensor in tensors}, folder / name)
    table = weight_map or {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": table}))


def refusal(folder: Path) -> str:
    with pytest.raises(SourceUnreadable) as caught:
        read_headers(folder)
    assert caught.value.exit_code == 7
    assert caught.value.fix
    return str(caught.value)


def test_headers_locate_every_tensor_in_a_single_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).bfloat16(),
        "c": torch.arange(6).reshape(1, 2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "flag": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    found = read_headers(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].read(), tensor)
        assert found[name].shape == tuple(tensor.shape)


def test_headers_locate_every_tensor_in_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]})
    found = read_headers(tmp_path)
    assert {name: stored.file.name for name, stored in found.items()} == {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }


def test_single_file_wins_where_an_index_exists_too(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model-1.safetensors": ["a"]})
    save_file({"b": torch.ones(1)}, tmp_path / SINGLE)
    assert list(read_headers(tmp_path)) == ["b"]


def test_files_are_resolved_when_they_are_links(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "blob")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / SINGLE).symlink_to("../blob")
    assert read_headers(snapshot)["a"].file == (tmp_path / "blob").resolve()


def test_no_torch_is_imported_by_reading_headers(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"a": ENTRY})
    code = "import sys, pathlib, calque.checkpoint as c; c.read_headers(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x10\0\0\0\0", "truncated: 5 bytes"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "header of 200000000 bytes, more than the format allows"),
        (b"\xff" * 16, "more than the format allows"),
        ((64).to_bytes(8, "little") + b"{}", "claims a header of 64 bytes and has 10"),
        ((2).to_bytes(8, "little") + b"[]", "its header holds a list, not a JSON object"),
        ((4).to_bytes(8, "little") + b"nope", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "its header is not JSON"),
        ((50_000).to_bytes(8, "little") + b"[" * 50_000, "its header is not JSON"),
        ((24).to_bytes(8, "little") + b'{"__metadata__":{},"":1}', "is not described by dtype, shape and data_offsets"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git-LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "more than the format allows"),
    ],
)
def test_file_is_refused_when_it_is_no_safetensors(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "F31"}, "has dtype F31; known are F64 F32"),
        ({"dtype": ["F32"]}, "has dtype ['F32']"),
        ({"shape": [-2, -2]}, "has shape [-2, -2]"),
        ({"shape": [2.0, 2]}, "has shape [2.0, 2]"),
        ({"shape": [True, 4]}, "has shape [True, 4]"),
        ({"shape": "2x2"}, "has shape 2x2"),
        ({"shape": [2**70, 0]}, "not a list of sizes"),
        ({"shape": [1] * 65 + [4]}, "not a list of sizes"),
        ({"shape": [2**40, 2**40]}, "has 16 bytes"),
        ({"shape": [2, 3]}, "has 16 bytes; F32 [2, 3] takes 24"),
        ({"data_offsets": [0, 16, 32]}, "not a begin and an end"),
        ({"data_offsets": [-16, 0]}, "not a begin and an end"),
        ({"data_offsets": [16, 0]}, "not a begin and an end"),
        ({"data_offsets": [0, 16.0]}, "not a begin and an end"),
        ({"data_offsets": [16, 32]}, "the file has"),
        ({"data_offsets": [1 << 62, (1 << 62) + 16]}, "the file has"),
    ],
)
def test_file_is_refused_when_an_entry_does_not_fit(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write(tmp_path / SINGLE, {"layer.weight": ENTRY | change})
    message = refusal(tmp_path)
    assert said in message
    assert "layer.weight" in message


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 24]}}, 24, "b  begins at byte"),
        ({"a": ENTRY, "b": ENTRY}, 16, "inside another tensor"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [20, 36]}}, 36, "the 4 bytes before belong to none"),
        ({"a": ENTRY}, 20, "the last 4 bytes belong to no tensor"),
        ({"a": ENTRY}, 15, "the file has"),
    ],
)
def test_file_is_refused_when_tensors_do_not_tile_it(tmp_path: Path, header: dict[str, Any], size: int, said: str) -> None:
    write(tmp_path / SINGLE, header, b"\0" * size)
    assert said in refusal(tmp_path)


def test_file_is_refused_when_a_name_occurs_twice(tmp_path: Path) -> None:
    entry = json.dumps(ENTRY)
    write(tmp_path / SINGLE, f'{{"a": {entry}, "a": {entry}}}'.encode())
    assert "a key occurs twice" in refusal(tmp_path)


def test_all_entries_are_reported_when_several_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {f"t{i}": ENTRY | {"dtype": "X"} for i in range(5)})
    message = refusal(tmp_path)
    assert all(f"t{i}  has dtype X" in message for i in range(5))


def test_names_cannot_write_control_characters_into_messages(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"\x1b[2J\nevil" + "x" * 500: ENTRY | {"dtype": "X"}})
    message = refusal(tmp_path)
    assert "\x1b" not in message
    assert len(message) < 1000


def test_every_truncation_and_altered_byte_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file({"a": torch.ones(2, 2), "b": torch.ones(3).half()}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refusal(tmp_path)
    chance = random.Random(0)
    for position in range(len(whole) - 22):
        path.write_bytes(whole[:position] + bytes([chance.randrange(256)]) + whole[position + 1 :])
        try:
            found = read_headers(tmp_path)
        except SourceUnreadable:
            continue
        assert all(stored.offset + stored.nbytes <= len(whole) for stored in found.values())


def test_all_offenders_are_reported_when_shards_and_tensors_are_missing(tmp_path: Path) -> None:
    table = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors", "d": "model-3.safetensors"}
    write_shards(tmp_path, {"model-1.safetensors": ["a"], "model-4.safetensors": ["e"]}, table | {"e": "model-4.safetensors"})
    (tmp_path / "model-4.safetensors").write_bytes(b"short")
    message = refusal(tmp_path)
    assert "b  not in model-1.safetensors" in message
    assert "model-2.safetensors  missing; the index places 1 tensors in it" in message
    assert "model-3.safetensors  missing" in message
    assert "model-4.safetensors  is truncated: 5 bytes" in message


def test_shards_are_refused_when_two_hold_the_same_name(tmp_path: Path) -> None:
    table = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    write_shards(tmp_path, {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["b", "a"]}, table)
    message = refusal(tmp_path)
    assert "a  in model-1.safetensors and in model-2.safetensors" in message
    assert "b  in model-1.safetensors and in model-2.safetensors" in message


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "x/../../y", "a\\..\\b", "C:evil", "nul\0", "", "..", 7, ["x"]])
def test_index_is_refused_when_a_shard_lies_outside_the_folder(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard, "b": "../other"}}))
    message = refusal(folder)
    assert "names files that it must not" in message
    assert "../other" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
    ],
)
def test_index_is_refused_when_it_places_nothing(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / INDEX).write_text(content)
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(("content", "said"), [("{", "is not JSON"), ("[]", "holds a list, not a JSON object")])
def test_json_that_is_no_object_is_not_taken_for_a_safetensors_file(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(SourceUnreadable, match=said) as caught:
        read_json(path)
    assert "safetensors" not in caught.value.fix


@pytest.mark.parametrize(
    ("names", "said", "fix"),
    [
        (["pytorch_model-00001-of-00002.bin"], "belong to no index", "pytorch_model.bin.index.json"),
        (["consolidated.00.pth"], "only pickles", "transformers format"),
        (["training_args.bin"], "nor any other weights", "--random-weights"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter", "merge_and_unload"),
        (["model-q4.gguf"], "only GGUF", "gguf_file='model-q4.gguf'"),
        (["model.onnx"], "of another framework", "safetensors"),
        (["tf_model.h5"], "of another framework", "safetensors"),
        (["model-00001-of-00002.safetensors"], "belong to no index", INDEX),
        (["config.json"], "nor any other weights", "--random-weights"),
    ],
)
def test_folder_without_a_checkpoint_is_refused_with_a_way_out(tmp_path: Path, names: list[str], said: str, fix: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceUnreadable) as caught:
        read_headers(tmp_path)
    assert said in caught.value.what
    assert fix in caught.value.fix


def test_link_that_leads_nowhere_is_reported_missing(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to("gone")
    assert f"{SINGLE}  missing" in refusal(tmp_path)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    refusal(tmp_path)


def test_content_hash_depends_on_names_and_bytes_and_not_on_the_path(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        write_shards(folder, {"model-1.safetensors": ["a"], "model-2.safetensors": ["b"]})
    one, two = tmp_path / "one", tmp_path / "two"
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in (one / "config.json", one / "model-1.safetensors", one / "model-2.safetensors")
    )
    assert sha256(one) == sha256(two) == hashlib.sha256(lines.encode()).hexdigest()
    (two / "config.json").write_text("{ }")
    changed = sha256(two)
    save_file({"b": torch.zeros(2)}, two / "model-2.safetensors")
    assert len({sha256(one), changed, sha256(two)}) == 3


def test_weight_files_are_named_relative_to_the_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model-2.safetensors": ["b"], "model-1.safetensors": ["a"]})
    assert list(weight_files(tmp_path)) == ["model-1.safetensors", "model-2.safetensors"]
