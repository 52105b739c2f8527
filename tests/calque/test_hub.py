from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from calque.errors import SourceUnreadable
from calque.source import ModelSource
from tests.fake_hub import COMMIT, TOKEN, FakeHub, running
from tests.tiny_checkpoints import as_pickle, write_llama, write_sentencepiece

MonkeyPatch = pytest.MonkeyPatch
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with ``org/name``, safetensors; the client asks it alone, and does not wait before it tries again."""
    with running() as hub:
        hub.repositories["org/name"] = write_llama(tmp_path / "repository")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def repository(hub: FakeHub) -> Path:
    return hub.repositories["org/name"]


def resolve(name: str, tmp_path: Path, **flags: Any) -> ModelSource:
    return ModelSource.resolve(name, scratch=tmp_path / "scratch", **flags)


def refusal(name: str, tmp_path: Path, **flags: Any) -> SourceUnreadable:
    with pytest.raises(SourceUnreadable) as caught:
        resolve(name, tmp_path, **flags)
    assert caught.value.exit_code == 7
    assert caught.value.fix
    return caught.value


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["org/name", "org/name@v1", f"org/name@{COMMIT}"])
def test_model_is_fetched_at_the_commit_that_its_revision_means(hub: FakeHub, tmp_path: Path, name: str) -> None:
    source = resolve(name, tmp_path)
    assert (source.describe()["id"], source.describe()["revision"]) == ("org/name", COMMIT)
    assert source.folder.name == COMMIT
    assert {stored.file.parent.name for stored in source.tensors.values()} == {"blobs"}
    source.load_eager()


def test_only_the_weights_that_are_needed_are_fetched(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    for other in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model-q4.gguf", "consolidated.safetensors", "modeling.py"):
        (repository / other).write_bytes(b"not wanted")
    for folder in ("onnx", "original"):
        (repository / folder).mkdir()
        (repository / folder / "model.onnx").write_bytes(b"not wanted")
    resolve("org/name", tmp_path)
    assert hub.fetched() == {"config.json", "generation_config.json", "model.safetensors"} & {path.name for path in repository.iterdir()}


@pytest.mark.parametrize("shards", [1, 2])
def test_repository_of_pickles_alone_is_fetched_by_its_index(hub: FakeHub, repository: Path, tmp_path: Path, shards: int) -> None:
    as_pickle(repository, shards)
    (repository / "pytorch_model-00009-of-00009.bin").write_bytes(b"left behind, in no index")
    source = resolve("org/name", tmp_path)
    pickles = {name for name in hub.fetched() if name.endswith(".bin")}
    assert len(pickles) == shards
    assert "pytorch_model-00009-of-00009.bin" not in pickles
    source.load_eager()


def test_random_weights_need_none_of_the_hub(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    source = resolve("org/name@v1", tmp_path, random_weights=True)
    assert source.revision == COMMIT
    assert not any(name.endswith((".safetensors", ".bin")) for name in hub.fetched())
    source.load_eager()


def test_bad_config_is_refused_before_weights_are_fetched(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    change_config(repository, model_type="unheard-of")
    assert "does not know model_type" in refusal("org/name", tmp_path).what
    assert "model.safetensors" not in hub.fetched()


def test_missing_repository_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    refused = refusal("org/absent", tmp_path)
    assert "org/absent is not on the hub, or is private" in refused.what
    assert f"{hub.address}/org/absent" in refused.fix
    assert "no folder of that name" in refused.fix


def test_missing_revision_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    refused = refusal("org/name@v2", tmp_path)
    assert "no such revision" in refused.what
    assert "/commits/main" in refused.fix


def test_gated_repository_is_refused_until_its_licence_is_accepted(hub: FakeHub, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    hub.gated.add("org/name")
    refused = refusal("org/name", tmp_path)
    assert "is gated" in refused.what
    assert "HF_TOKEN" in refused.fix
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve("org/name", tmp_path).revision == COMMIT


def test_private_repository_is_read_with_the_token_of_the_environment(hub: FakeHub, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    hub.private.add("org/name")
    assert "or is private" in refusal("org/name", tmp_path).what
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "or is private" in refusal("org/name", tmp_path).what
    hub.asked.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve("org/name", tmp_path).revision == COMMIT
    assert {token for _, _, token in hub.asked} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("names", "said", "fix"),
    [
        (["README.md"], "org/name on the hub has no config.json", "transformers format"),
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter", "merge_and_unload"),
        (["model-q4.gguf"], "only GGUF", "gguf_file='model-q4.gguf'"),
        (["onnx/model.onnx"], "only an export to another format", "made of"),
        (["model_index.json"], "is a diffusers pipeline", "language models"),
        (["params.json", "consolidated.00.pth"], "its publisher's own params.json", "transformers format"),
    ],
)
def test_repository_without_config_is_refused_for_what_it_is(hub: FakeHub, tmp_path: Path, names: list[str], said: str, fix: str) -> None:
    folder = hub.repositories["org/name"] = tmp_path / "other"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    refused = refusal("org/name", tmp_path)
    assert said in refused.what
    assert fix in refused.fix


@pytest.mark.parametrize(
    ("names", "said"), [(["weights.pt"], "only pickles"), (["model.gguf"], "only GGUF"), ([], "org/name on the hub holds none of")]
)
def test_repository_without_weights_is_refused_for_what_it_has(
    hub: FakeHub, repository: Path, tmp_path: Path, names: list[str], said: str
) -> None:
    (repository / "model.safetensors").unlink()
    for name in names:
        (repository / name).write_bytes(b"x")
    refused = refusal("org/name", tmp_path)
    assert said in refused.what
    assert list(refused.where) == names


def test_adapter_beside_a_config_is_refused_before_weights_are_fetched(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    (repository / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "is a PEFT adapter of org/base" in refusal("org/name", tmp_path).what
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_download_that_breaks_off_is_refused_and_goes_on_next_time(hub: FakeHub, tmp_path: Path, file: str) -> None:
    hub.cut.add(file)
    refused = refusal("org/name", tmp_path)
    assert "could not be fetched" in refused.what
    assert "what was fetched is kept" in refused.fix
    hub.cut.clear()
    resolve("org/name", tmp_path).load_eager()


def test_network_that_is_down_is_refused_with_its_reason(hub: FakeHub, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    with running() as other:
        gone = other.address
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", gone + "/{repo_id}/resolve/{revision}/{filename}")
    refused = refusal("org/name", tmp_path)
    assert gone in refused.what
    assert "refused" in refused.what
    assert "network" in refused.fix


def test_hub_that_is_down_is_refused_unless_the_model_is_cached(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken = 503
    assert "503" in refusal("org/name", tmp_path).what
    hub.broken = 0
    resolve("org/name", tmp_path)
    hub.broken = 503
    assert resolve("org/name", tmp_path).revision == COMMIT


def test_nothing_is_asked_of_the_hub_when_offline(hub: FakeHub, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused = refusal("org/name", tmp_path)
    assert "HF_HUB_OFFLINE forbids fetching it" in refused.what
    assert "HF_HOME" in refused.fix
    assert hub.asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    resolve("org/name", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert resolve("org/name", tmp_path).revision == COMMIT
    assert hub.asked == []


def test_cached_config_without_its_weights_is_refused_when_offline(hub: FakeHub, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    resolve("org/name", tmp_path, random_weights=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "not all in the local cache" in refusal("org/name", tmp_path).what


def test_cached_model_without_its_card_is_read_when_offline(
    hub: FakeHub, repository: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    (repository / "README.md").write_text("a card")
    (resolve("org/name", tmp_path).folder / "README.md").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name", tmp_path).revision == COMMIT


def test_cache_whose_blob_is_lost_is_refused_when_offline(hub: FakeHub, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (resolve("org/name", tmp_path).folder / "model.safetensors").resolve().unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "not all in the local cache" in refusal("org/name", tmp_path).what


def test_cache_that_cannot_be_written_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache should be")
    refused = refusal("org/name", tmp_path)
    assert str(tmp_path / "cache") in refused.what
    assert "HF_HOME" in refused.fix


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(r"{mark}").write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_repository_runs_only_when_it_is_trusted(
    hub: FakeHub, repository: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (repository / "own.py").write_text(OWN_CODE.format(mark=tmp_path / "ran"))
    change_config(repository, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"})
    refused = refusal("org/name", tmp_path)
    assert "--trust-remote-code" in refused.fix
    assert "own.py" not in hub.fetched()
    assert not (tmp_path / "ran").exists()
    source = resolve("org/name", tmp_path, trust_remote_code=True)
    assert type(source.load_eager()).__name__ == "OwnForCausalLM"
    assert (tmp_path / "ran").exists()


def test_licence_and_card_are_fetched(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    for name in ("license", "Notice.TXT", "USE_policy.md", "README.md"):
        (repository / name).write_text("terms")
    source = resolve("org/name", tmp_path)
    assert {path.name for path in source.companion_files()} >= {"license", "Notice.TXT", "USE_policy.md"}
    assert (source.folder / "README.md").is_file()


def test_pickles_and_sentencepiece_of_the_hub_become_an_artifact(tmp_path: Path) -> None:
    """The command alone, as a user runs it: weights and tokenizer in their old formats, a tag, a licence in the card."""
    with running() as hub:
        folder = hub.repositories["org/name"] = write_llama(tmp_path / "repository")
        as_pickle(folder, shards=2)
        write_sentencepiece(folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        (folder / "README.md").write_text("---\nlicense: llama2\n---\n# Name\n")
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-m", "calque.cli", "convert", "org/name@v1", "--target", "onnxruntime", "-o", str(tmp_path / "out")]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["source"]["id"], manifest["source"]["revision"]) == ("org/name", COMMIT)
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= manifest["files"].keys()
    notes = "\n".join(json.loads((tmp_path / "out" / "report.json").read_text())["notes"])
    assert "tokenizer.json was made of tokenizer.model" in notes
    assert "the licence llama2" in notes
    answer = [sys.executable, "-m", "calque.cli", "generate", str(tmp_path / "out"), "-p", "The function", "--max-new-tokens", "3"]
    spoken = subprocess.run(answer, capture_output=True, text=True, check=False, cwd=ROOT)
    assert spoken.returncode == 0, spoken.stderr
