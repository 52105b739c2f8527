"""What counts as proved already: every change of the recipe, the model, the tools or the artifact is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calque import cli, pipeline
from calque.errors import SourceUnreadable
from calque.recipe import Recipe
from calque.resume import differences
from tests.tiny_models import TINY, save_random

QUICK = {"target": "onnxruntime", "parity": {"scenarios": ["single-prompt", "ragged-left"]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the artifact that was made of it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "model").mkdir()
    save_random(TINY["llama"], folder / "model")
    (folder / "model" / "LICENSE").write_text("mine")
    pipeline.convert(Recipe.of({"model": str(folder / "model"), **QUICK}), folder / "out")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def found(place: Path, **settings: Any) -> list[str]:
    return differences(Recipe.of({"model": str(place / "model"), **QUICK, **settings}), place / "out")


def edit_manifest(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = place / "out" / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_is_unchanged_is_proved_already(place: Path) -> None:
    assert found(place) == []
    assert found(place, threads=2, require="execution") == []


def test_a_changed_weight_byte_is_seen(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert [line.partition(" was ")[0] for line in found(place)] == ["source: sha256"]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"logits": "last"}, "logits"),
        ({"dims": {"max_length": 64}}, "dims"),
        ({"parity": {"scenarios": "all"}}, "parity"),
        ({"random_weights": True}, "random_weights"),
        ({"passes": ["cache_dynamic"]}, "passes"),
    ],
)
def test_a_changed_key_of_the_recipe_is_seen(place: Path, settings: dict[str, Any], key: str) -> None:
    assert [line.partition(" was ")[0] for line in found(place, **settings)] == [f"recipe: {key}"]


@pytest.mark.parametrize("tool", ["calque", "onnxruntime", "torch"])
def test_another_version_of_a_tool_is_seen(place: Path, tool: str) -> None:
    edit_manifest(place, lambda data: data["tools"].update({tool: "0.0.1"}))
    assert [line.partition(", is ")[0] for line in found(place)] == [f"{tool} was 0.0.1"]


def test_packages_of_a_target_are_held_against_those_that_are_here(place: Path) -> None:
    edit_manifest(place, lambda data: data["tools"].update({"pytest": pytest.__version__}))
    assert found(place) == []
    edit_manifest(place, lambda data: data["tools"].update({"pytest": "0.1", "no-such-package": "2.0"}))
    assert found(place) == ["no-such-package was 2.0, is None", f"pytest was 0.1, is {pytest.__version__}"]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "config.json", "reference/single-prompt.npz"])
def test_a_damaged_file_is_seen(place: Path, name: str) -> None:
    path = place / "out" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert found(place) == [f"{name}  bytes differ from the manifest's sha256"]
    path.unlink()
    assert found(place) == [f"{name}  missing"]


@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_a_manifest_or_report_that_cannot_be_read_is_seen(place: Path, name: str) -> None:
    (place / "out" / name).write_text("{")
    assert len(found(place)) == 1
    (place / "out" / name).unlink()
    assert len(found(place)) == 1


def test_a_changed_new_or_removed_companion_is_seen(place: Path) -> None:
    (place / "model" / "LICENSE").write_text("another's")
    assert found(place) == ["source: LICENSE is another"]
    (place / "model" / "LICENSE").unlink()
    (place / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert found(place) == ["source: chat_template.jinja is another", "source: LICENSE is gone"]


def test_what_was_not_proved_is_seen_where_it_is_asked_for(place: Path) -> None:
    edit_manifest(place, lambda data: data["proof"]["execution"].update(status="not_run"))
    assert found(place) == found(place, require="build") == []
    assert found(place, require="execution") == ["execution: not run"]
    edit_manifest(place, lambda data: data["proof"]["numerics"].update(status="not_run"))
    assert found(place) == ["numerics: not run"]


def test_a_check_that_failed_is_seen(place: Path) -> None:
    edit_manifest(place, lambda data: data["proof"]["build"].update(status="failed"))
    assert found(place) == ["build: failed"]


def test_a_folder_that_is_not_there_is_converted(place: Path) -> None:
    shutil.rmtree(place / "out")
    assert found(place) == [f"{place / 'out'} does not exist"]


def test_a_model_that_is_gone_is_an_error(place: Path) -> None:
    shutil.rmtree(place / "model")
    with pytest.raises(SourceUnreadable):
        found(place)


def test_resuming_skips_converts_anew_and_skips_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(place / "model"), "--target", "onnxruntime", "--scenarios", "single-prompt,ragged-left"]
    command += ["-o", str(place / "out"), "--resume"]
    before = (place / "out" / "manifest.json").stat()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{place / 'out'}: skipped (already proved)\n"
    assert cli.main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["status"], facts["proof"]["numerics"]["status"]) == ("skipped", "passed")
    assert (place / "out" / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns

    graph = (place / "out" / "model.onnx").read_bytes()
    (place / "out" / "model.onnx").write_bytes(graph[:-1])
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "convert, because model.onnx  bytes differ" in err
    assert "wrote" in out
    assert (place / "out" / "model.onnx").read_bytes() == graph
    assert cli.main(command) == 0
    assert "skipped" in capsys.readouterr().out


def test_resuming_never_replaces_what_is_not_an_artifact(place: Path) -> None:
    (place / "out" / "manifest.json").write_text("{}")
    command = ["convert", str(place / "model"), "--target", "onnxruntime", "-o", str(place / "out")]
    assert cli.main([*command, "--resume"]) == 2
    assert (place / "out" / "model.onnx").is_file()


def test_resuming_and_replacing_exclude_each_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "builtin:quill", "--target", "onnxruntime", "--resume", "--force"]) == 2
    assert "Fix: give one of them" in capsys.readouterr().err
