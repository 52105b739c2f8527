from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from calque import source as source_module
from calque.errors import SourceUnreadable, Unsupported, UsageError, WeightMismatch
from calque.random_weights import write_random_weights
from calque.source import ModelSource

MonkeyPatch = pytest.MonkeyPatch
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny(model_type: str = "llama", **changes: Any) -> Any:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CONFIG_MAPPING[model_type](**shape | {"num_key_value_heads": 1, "num_local_experts": 2, "pad_token_id": 0} | changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "my-model"
    folder.mkdir(parents=True)
    tiny().save_pretrained(folder)
    write_random_weights(tiny(), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE.txt", "README.md"):
        (folder / name).write_text("{}")
    return folder


def refusal(name: str | Path, scratch: Path, **flags: Any) -> SourceUnreadable:
    with pytest.raises(SourceUnreadable) as caught:
        ModelSource.resolve(str(name), scratch=scratch, **flags)
    assert caught.value.exit_code == 7
    assert caught.value.fix
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_framework_is_imported_by_the_module() -> None:
    code = "import sys, calque.source; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_folder_is_described_without_its_path(model: Path, tmp_path: Path) -> None:
    source = ModelSource.resolve(str(model), scratch=tmp_path / "scratch")
    assert source.describe() == {"id": "my-model", "revision": None, "sha256": source.sha256()}
    assert re.fullmatch("[0-9a-f]{64}", source.sha256())
    assert source.tensors.keys() == load_file(model / "model.safetensors").keys()
    assert source.config.model_type == "llama"
    assert not (tmp_path / "scratch").exists()


def test_folder_keeps_its_name_when_it_is_the_current_one_or_a_link(model: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "alias").symlink_to(model)
    assert ModelSource.resolve(str(tmp_path / "alias"), scratch=tmp_path).id == "alias"
    monkeypatch.chdir(model)
    assert ModelSource.resolve(".", scratch=tmp_path).id == "my-model"


def test_companions_are_the_files_that_travel_with_an_artifact(model: Path, tmp_path: Path) -> None:
    (model / "modeling_own.py").write_text("")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("")
    found = ModelSource.resolve(str(model), scratch=tmp_path).companion_files()
    expected = "LICENSE.txt additional_chat_templates/tools.jinja chat_template.jinja config.json generation_config.json"
    assert " ".join(str(path.relative_to(model)) for path in found) == expected + " tokenizer.json tokenizer_config.json"


def test_eager_model_is_the_checkpoint_unchanged(model: Path, tmp_path: Path) -> None:
    eager = ModelSource.resolve(str(model), scratch=tmp_path).load_eager()
    state = eager.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())
    assert eager.config._attn_implementation == "eager"
    assert not eager.training
    assert not any(param.requires_grad for param in eager.parameters())


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bloom"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_eager_model_runs_in_the_dtype_asked_for(model_type: str, dtype: str, tmp_path: Path) -> None:
    tiny(model_type).save_pretrained(tmp_path)
    eager = ModelSource.resolve(str(tmp_path), random_weights=True, scratch=tmp_path / "scratch").load_eager(dtype)
    with torch.no_grad():
        logits = eager(torch.arange(8)[None]).logits
    assert logits.dtype == getattr(torch, dtype)
    assert torch.isfinite(logits).all()


def test_eager_model_is_refused_when_a_parameter_has_no_bytes(model: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightMismatch) as caught:
        ModelSource.resolve(str(model), scratch=tmp_path).load_eager()
    assert caught.value.where == ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")


def test_eager_model_is_refused_when_a_parameter_has_another_shape(model: Path, tmp_path: Path) -> None:
    change_config(model, intermediate_size=40)
    with pytest.raises(SourceUnreadable, match="my-model"):
        ModelSource.resolve(str(model), scratch=tmp_path).load_eager()


def test_tokenizer_may_be_absent(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    ModelSource.resolve(str(model), scratch=tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "", "quil", "org/", "~/nowhere"])
def test_unknown_name_is_refused_with_what_could_be_named(name: str, tmp_path: Path, monkeypatch: MonkeyPatch, builtin: Path) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(name, tmp_path)
    assert "no folder of that name exists" in error.what
    assert "builtin:quill" in error.fix
    assert ("did you mean" in error.fix) == (name == "quil")


@pytest.mark.parametrize(
    ("names", "said", "fix"),
    [
        ([], "has no config.json", "transformers format"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter", "merge_and_unload"),
        (["model-q4.gguf"], "has no config.json, only GGUF", "gguf_file='model-q4.gguf'"),
        (["model.onnx"], "only an export to another format", "made of"),
        (["model_index.json"], "is a diffusers pipeline", "language models"),
        (["params.json", "consolidated.00.pth"], "its publisher's own params.json", "transformers format"),
    ],
)
def test_folder_without_config_is_refused_for_what_it_is(tmp_path: Path, names: list[str], said: str, fix: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    error = refusal(folder, tmp_path)
    assert said in error.what
    assert fix in error.fix


@pytest.mark.parametrize("settings", ['{"base_model_name_or_path": "org/base"}', "[]", "not JSON"])
def test_adapter_is_refused_beside_a_whole_model_too(model: Path, tmp_path: Path, settings: str) -> None:
    (model / "adapter_config.json").write_text(settings)
    error = refusal(model, tmp_path)
    assert "PEFT adapter" in error.what
    assert ("of org/base" in error.what) == ("org/base" in settings)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("instead", ["folder", "link that leads nowhere", "link that is too long", "link to itself"])
def test_file_that_cannot_be_read_is_refused(model: Path, tmp_path: Path, name: str, instead: str) -> None:
    path = model / name
    path.unlink()
    if instead == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link that leads nowhere": "gone", "link that is too long": "x" * 300}.get(instead, name))
    assert name in str(refusal(model, tmp_path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("C:\\models\\llama", "C:/models/llama"),
        ("models\\llama", "models/llama"),
        ("https://huggingface.co/org/name", "leave out the address"),
        ("x" * 300, "check the path"),
        ("org/name/", "name a folder"),
        ("~nobody-of-that-name/model", "name a folder"),
        ("a\0b", "name a folder"),
    ],
)
def test_name_that_looks_like_something_else_is_refused_with_a_hint(name: str, hint: str, tmp_path: Path) -> None:
    assert hint in refusal(name, tmp_path).fix


def test_folder_wins_over_a_hub_id_of_the_same_name(model: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(model.parents[1])
    assert ModelSource.resolve("models/my-model", scratch=tmp_path).revision is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
        ("{}", "has no model_type"),
        ('{"model_type": 7}', "has no model_type"),
        ('{"model_type": "lama"}', "does not know model_type 'lama'; nearest: llama"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "no usable llama model"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "no usable llama model"),
        ('{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}', "describes no llama model"),
        ('{"model_type": "gpt2", "n_layer": 100000}', "describes no gpt2 model"),
    ],
)
def test_config_is_refused_when_it_describes_no_model(model: Path, tmp_path: Path, content: str, said: str) -> None:
    (model / "config.json").write_text(content)
    assert said in refusal(model, tmp_path).what


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path(r"{mark}")).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """The model needs code of its own; that code leaves a file ``ran``."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (model / "own.py").write_text(CODE.format(mark=tmp_path / "ran"))
    change_config(model, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"})
    return model


@pytest.mark.parametrize("random_weights", [False, True])
def test_own_code_does_not_run_unasked(own_code: Path, tmp_path: Path, random_weights: bool) -> None:
    error = refusal(own_code, tmp_path / "scratch", random_weights=random_weights)
    assert "--trust-remote-code" in error.fix
    assert error.where == ("own.OwnConfig", "own.OwnForCausalLM")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("random_weights", [False, True])
def test_own_code_runs_when_trusted(own_code: Path, tmp_path: Path, random_weights: bool) -> None:
    source = ModelSource.resolve(str(own_code), random_weights=random_weights, trust_remote_code=True, scratch=tmp_path / "scratch")
    assert source.trust_remote_code
    assert type(source.load_eager()).__name__ == "OwnForCausalLM"
    assert (tmp_path / "ran").exists()


def test_own_code_does_not_run_when_transformers_knows_the_type(own_code: Path, tmp_path: Path) -> None:
    change_config(own_code, model_type="llama")
    assert type(ModelSource.resolve(str(own_code), scratch=tmp_path).load_eager()).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_config_alone_gets_random_weights_that_are_the_same_each_time(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "LICENSE.txt").write_text("terms")
    change_config(model, quantization_config={"quant_method": "mxfp4"})
    one = ModelSource.resolve(str(model / "config.json"), random_weights=True, scratch=tmp_path / "one")
    two = ModelSource.resolve(str(model), random_weights=True, scratch=tmp_path / "two")
    assert one.describe() == two.describe()
    assert one.id == "my-model"
    assert one.random_weights
    assert one.folder == tmp_path / "one"
    assert one.tensors["model.norm.weight"].file == (tmp_path / "one" / "model.safetensors").resolve()
    assert (tmp_path / "one" / "LICENSE.txt").read_text() == "terms"
    assert "quantization_config" not in json.loads((tmp_path / "one" / "config.json").read_text())
    one.load_eager()


def test_random_weights_replace_those_of_the_model(model: Path, tmp_path: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    write_random_weights(tiny(), model, seed=1)
    own = ModelSource.resolve(str(model), scratch=tmp_path / "scratch")
    drawn = ModelSource.resolve(str(model), random_weights=True, scratch=tmp_path / "scratch")
    assert drawn.sha256() != own.sha256()
    assert (tmp_path / "scratch" / "model.safetensors").read_bytes() == before


def test_random_weights_never_overwrite_the_models_own(model: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="overwrite"):
        ModelSource.resolve(str(model), random_weights=True, scratch=model)
    assert (model / "model.safetensors").read_bytes() == before


def test_random_weights_are_refused_when_the_model_is_no_causal_lm(tmp_path: Path) -> None:
    CONFIG_MAPPING["detr"]().save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="detr"):
        ModelSource.resolve(str(tmp_path), random_weights=True, scratch=tmp_path / "scratch")


def test_config_file_is_refused_without_random_weights(model: Path, tmp_path: Path) -> None:
    assert "--random-weights" in refusal(model / "config.json", tmp_path).fix
    assert "not named config.json" in refusal(model / "tokenizer.json", tmp_path, random_weights=True).what
    assert "name the folder" in refusal(model / "model.safetensors", tmp_path).fix


@pytest.fixture
def builtin(model: Path, monkeypatch: MonkeyPatch) -> Path:
    monkeypatch.setattr(source_module, "BUILTIN_FOLDER", model.parent)
    return model.rename(model.parent / "quill")


def test_builtin_is_found_by_name(builtin: Path, tmp_path: Path) -> None:
    source = ModelSource.resolve("builtin:quill", scratch=tmp_path)
    assert source.id == "builtin:quill"
    assert source.folder == builtin


@pytest.mark.parametrize("name", ["builtin:quil", "builtin:", "builtin:../models/quill", "builtin:."])
def test_unknown_builtin_is_refused_with_a_list(builtin: Path, tmp_path: Path, name: str) -> None:
    assert refusal(name, tmp_path).fix == "builtin models are: builtin:quill"


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def failing(monkeypatch: MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (errors.GatedRepoError("403", response=response(403)), "is gated", "HF_TOKEN"),
        (errors.HfHubHTTPError("403", response=response(403)), "is gated", "https://huggingface.co/org/name "),
        (errors.RepositoryNotFoundError("401", response=response(401)), "not on the hub, or is private", "no folder of that name"),
        (errors.HfHubHTTPError("401", response=response(401)), "not on the hub, or is private", "HF_TOKEN"),
        (errors.RevisionNotFoundError("404", response=response(404)), "no such revision", "/commits/main"),
        (errors.LocalEntryNotFoundError("connection refused"), "could not be fetched", "check the network"),
        (errors.HfHubHTTPError("502", response=response(502)), "could not be fetched", "check the network"),
        (errors.HFValidationError("bad --"), "is no hub id", "org/name[@revision]"),
        (ConnectionResetError("reset by peer"), "ConnectionResetError: reset by peer", "check the network"),
        (OSError(28, "No space left on device"), "No space left", "the disk"),
    ],
)
def test_hub_failure_is_told_apart(error: Exception, what: str, fix: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    failing(monkeypatch, error)
    refused = refusal("org/name@v1", tmp_path)
    assert what in refused.what
    assert fix in refused.fix
    assert refused.__cause__ is error


@pytest.fixture
def cache(model: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """The hub's cache holds the model as org/name; the hub itself is out of reach. Return the snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    for part in (snapshot, folder / "blobs", folder / "refs"):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir():
        blob = folder / "blobs" / f"blob-{file.name}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("name", ["org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_hub_model_is_read_from_the_cache_at_one_commit(cache: Path, tmp_path: Path, name: str) -> None:
    source = ModelSource.resolve(name, scratch=tmp_path / "scratch")
    assert (source.id, source.revision) == ("org/name", COMMIT)
    assert {stored.file.parent.name for stored in source.tensors.values()} == {"blobs"}
    assert "tokenizer.json" in {path.name for path in source.companion_files()}
    source.load_eager()


OFFLINE = """
import sys, pathlib, calque.errors, calque.source
try:
    calque.source.ModelSource.resolve("org/absent", scratch=pathlib.Path(sys.argv[1]))
except calque.errors.SourceUnreadable as error:
    print(error)
    sys.exit("torch loaded" if "torch" in sys.modules else error.exit_code)
"""


def test_hub_model_is_refused_when_offline_and_not_cached(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "HF_HUB_OFFLINE forbids" in done.stdout
