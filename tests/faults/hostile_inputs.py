"""Models, hub caches and recipes that are broken or meant to do harm: each function makes one and returns what names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What code of the model would leave, had it run.
CANARY = "canary"

Maker = Callable[[Path], list[str]]


def _config(changes: dict[str, Any]) -> Maker:
    """Change a model's config; None drops a key. The NaN and the infinities of Python's json are written as such."""

    def make(model: Path) -> list[str]:
        table = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
        return [str(model)]

    return make


def _text(name: str, content: str | bytes) -> Maker:
    """Write a file of the model."""

    def make(model: Path) -> list[str]:
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [str(model)]

    return make


def _weights(change: Callable[[bytearray], bytes | bytearray]) -> Maker:
    """Change the bytes of a model's weights."""

    def make(model: Path) -> list[str]:
        path = model / "model.safetensors"
        path.write_bytes(change(bytearray(path.read_bytes())))
        return [str(model)]

    return make


def _header(change: Callable[[dict[str, Any]], object]) -> Maker:
    """Change the header of a model's weights, its data left as they are."""

    def rewritten(data: bytearray) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(data[8 + length :])

    return _weights(rewritten)


def _first(change: Callable[[dict[str, Any]], object]) -> Maker:
    """Change the header's entry of the first tensor."""
    return _header(lambda header: change(next(entry for name, entry in header.items() if name != "__metadata__")) and None)


def _flipped(data: bytearray) -> bytearray:
    """Flip one bit of the header, where the first shape is written."""
    data[data.index(b'"shape":[') + 9] ^= 0b100
    return data


def _recipe(text: str) -> Maker:
    """Write a recipe that names the model, unless it says otherwise, and convert by it."""

    def make(model: Path) -> list[str]:
        path = model.parent / "recipe.yaml"
        path.write_text(text.replace("MODEL", str(model)).replace("CANARY", str(model.parent / CANARY)))
        return ["--recipe", str(path)]

    return make


def own_code(model: Path) -> list[str]:
    """A model with code of its own, for a type that transformers knows: its own class is what the config asks for."""
    code = f"open({str(model.parent / CANARY)!r}, 'w').close()\nclass M: pass\n"
    (model / "modeling_own.py").write_text(code)
    return _config({"auto_map": {"AutoConfig": "modeling_own.M", "AutoModelForCausalLM": "modeling_own.M"}})(model)


def own_code_of_an_unknown_type(model: Path) -> list[str]:
    """A model of a type that only its own code knows."""
    own_code(model)
    return _config({"model_type": "unheard_of"})(model)


def pickle_instead_of_safetensors(model: Path) -> list[str]:
    """A pickle that, loaded, runs code."""
    (model / "model.safetensors").unlink()
    payload = f"cos\nsystem\n(S'touch {model.parent / CANARY}'\ntR.".encode()
    (model / "pytorch_model.bin").write_bytes(payload)
    return [str(model)]


def template_that_runs_code(model: Path) -> list[str]:
    """A chat template that reaches for the system; converting copies it and renders nothing."""
    reach = "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__['os'].system('touch %s') }}"
    (model / "chat_template.jinja").write_text(reach % (model.parent / CANARY))
    return [str(model)]


def _hub(change: Callable[[Path], object]) -> Maker:
    """Move the model into the hub's cache that the environment names, then break that."""

    def make(model: Path) -> list[str]:
        repository = Path(os.environ["HF_HUB_CACHE"]) / "models--org--name"
        commit = "c0ffee" + "0" * 34
        shutil.rmtree(repository, ignore_errors=True)
        (repository / "snapshots").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        model.rename(repository / "snapshots" / commit)
        change(repository)
        return ["org/name"]

    return make


def _snapshot(repository: Path) -> Path:
    return next((repository / "snapshots").iterdir())


def _dangle(repository: Path) -> None:
    path = _snapshot(repository) / "model.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/0000")


def _file_for_snapshots(repository: Path) -> None:
    (repository / "snapshots").rename(repository / "moved")
    (repository / "snapshots").touch()


def _renamed(header: dict[str, Any]) -> dict[str, Any]:
    return {name + ".x" * (place == 5): entry for place, (name, entry) in enumerate(header.items())}


def shard_outside_the_folder(model: Path) -> list[str]:
    """An index that names a file of the system as a shard."""
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    return [str(model)]


def binary_recipe(model: Path) -> list[str]:
    """A recipe that is no text."""
    path = model.parent / "recipe.yaml"
    path.write_bytes(b"\0\xff" * 50)
    return ["--recipe", str(path)]


BILLION_LAUGHS = "schema: 1\na: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
NESTED = "[" * 100_000

MODELS: dict[str, tuple[Maker, int, str]] = {
    "config: negative size": (_config({"hidden_size": -64}), 7, ""),
    "config: no heads": (_config({"num_attention_heads": 0}), 7, ""),
    "config: vocabulary of 10^15": (_config({"vocab_size": 10**15}), 7, r"vocab_size: 1000000000000000  no tensor"),
    "config: 10^9 layers": (_config({"num_hidden_layers": 10**9}), 7, r"num_hidden_layers: 1000000000"),
    "config: size beyond int64": (_config({"hidden_size": 10**30}), 7, ""),
    "config: NaN for an epsilon": (_config({"rms_norm_eps": float("nan")}), 7, ""),
    "config: infinite rope_theta": (_config({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}), 0, ""),
    "config: text for a size": (_config({"hidden_size": "large"}), 7, ""),
    "config: a list for the type": (_config({"model_type": ["llama"]}), 7, ""),
    "config: no size": (_config({"hidden_size": None}), 7, ""),
    "config: unknown activation": (_config({"hidden_act": "does_not_exist"}), 7, ""),
    "config: activation that is code": (_config({"hidden_act": "__import__('os').system('touch canary')"}), 7, ""),
    "config: nested without end": (_text("config.json", '{"model_type": ' + NESTED), 7, ""),
    "config: a number of 10^5 digits": (_text("config.json", '{"model_type": "llama", "hidden_size": ' + "9" * 100_000 + "}"), 7, ""),
    "config: not UTF-8": (_text("config.json", b"\xff\xfe\x00{"), 7, ""),
    "config: empty": (_text("config.json", ""), 7, ""),
    "config: another architecture": (_config({"architectures": ["LlamaForSequenceClassification"]}), 4, ""),
    "weights: cut short": (_weights(lambda data: data[: len(data) // 2]), 7, ""),
    "weights: header cut short": (_weights(lambda data: data[:100]), 7, ""),
    "weights: empty": (_weights(lambda data: b""), 7, ""),
    "weights: bytes appended": (_weights(lambda data: data + b"\0" * 64), 7, ""),
    "weights: a bit of the header flipped": (_weights(_flipped), 7, ""),
    "weights: header longer than the file": (_weights(lambda data: b"\xff" * 7 + b"\x00" + data[8:]), 7, ""),
    "weights: header of nested brackets": (_weights(lambda data: (10**5).to_bytes(8, "little") + NESTED.encode() + data), 7, ""),
    "weights: offsets outside the file": (_first(lambda entry: entry.update(data_offsets=[2**62, 2**62 + 8])), 7, ""),
    "weights: negative offsets": (_first(lambda entry: entry.update(data_offsets=[-8, 0])), 7, ""),
    "weights: NaN in a shape": (_first(lambda entry: entry.update(shape=[float("nan")])), 7, ""),
    "weights: shape of 2^62": (_first(lambda entry: entry.update(shape=[2**62, 2**62])), 7, ""),
    "weights: a tensor renamed": (_header(_renamed), 7, ""),
    "index: a shard outside the folder": (shard_outside_the_folder, 7, ""),
    "code: of a known type": (own_code, 0, ""),
    "code: of an unknown type": (own_code_of_an_unknown_type, 7, ""),
    "code: in a pickle": (pickle_instead_of_safetensors, 7, ""),
    "code: in a chat template": (template_that_runs_code, 0, ""),
    "hub: not in the cache": (lambda model: ["org/nothing"], 7, ""),
    "hub: cached commit is gone": (_hub(lambda repository: (repository / "refs" / "main").write_text("f" * 40)), 7, ""),
    "hub: link to a missing blob": (_hub(_dangle), 7, ""),
    "hub: config damaged": (_hub(lambda repository: (_snapshot(repository) / "config.json").write_bytes(b"\0" * 100)), 7, ""),
    "hub: weights cut short": (_hub(lambda repository: os.truncate(_snapshot(repository) / "model.safetensors", 1000)), 7, ""),
    "hub: a file in place of the snapshots": (_hub(_file_for_snapshots), 7, ""),
    "recipe: billion laughs": (_recipe(BILLION_LAUGHS), 2, ""),
    "recipe: nested without end": (_recipe(NESTED), 2, ""),
    "recipe: a tag that runs code": (_recipe("model: MODEL\ntarget: !!python/object/apply:os.system ['touch CANARY']\n"), 2, ""),
    "recipe: binary": (binary_recipe, 2, ""),
    "recipe: a number of 10^5 digits": (_recipe("model: MODEL\ntarget: onnxruntime\nthreads: " + "9" * 100_000), 2, ""),
    "recipe: NaN for a count": (_recipe("model: MODEL\ntarget: onnxruntime\ndims: {max_length: .nan}\n"), 2, ""),
    "recipe: a folder": (lambda model: ["--recipe", str(model)], 2, ""),
    "recipe: absent": (lambda model: ["--recipe", str(model / "none.yaml")], 2, ""),
}  # fmt: skip
