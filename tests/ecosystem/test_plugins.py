from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calque import passes, targets
from calque.errors import TargetUnavailable, UsageError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding.md"


def calque(*arguments: object, site: Path | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with the distributions in ``site`` installed."""
    paths = os.pathsep.join(str(path) for path in (site, ROOT) if path)
    command = [sys.executable, "-m", "calque.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, "PYTHONPATH": paths})


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's distribution, written out and installed by pip without an index; its recipe lies beside it."""
    folder, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, text in re.findall(r"```\w+\n# ([\w/.]+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        path = site / name if name == "recipe.yaml" else folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (folder / "calque_example" / "__init__.py").touch()
    quiet = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(site), str(folder)], check=True)
    return site


def test_page_holds_every_file_of_the_example(example: Path) -> None:
    found = {path.relative_to(example).as_posix() for path in example.rglob("*.*") if "__pycache__" not in path.parts}
    assert {
        "recipe.yaml",
        "calque_example/silu.py",
        "calque_example/ort_format.py",
        "calque_example-1.0.dist-info/entry_points.txt",
    } <= found


def test_targets_of_a_plugin_are_listed_with_the_built_in_ones(example: Path) -> None:
    listed = json.loads(calque("targets", "--json", site=example).stdout)
    assert set(listed) == {*targets.built_in(), "ort-format"}
    assert {row["what"] for row in listed["ort-format"]} == {row["what"] for row in listed["onnxruntime"]}


def test_recipe_with_a_plugins_pass_and_target_converts_proves_validates_and_generates(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = calque("convert", "--recipe", example / "recipe.yaml", "-o", out, "--json", site=example)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["target"] == "ort-format"
    assert manifest["passes"]["write_out_silu"] == 4
    assert manifest["tools"]["calque-example"] == "1.0"
    assert manifest["proof"]["numerics"]["status"] == "passed"
    assert (out / "model.ort").read_bytes()[4:8] == b"ORTM"
    assert not (out / "model.onnx").exists()
    left = [row["skipped"] for row in json.loads((out / "report.json").read_text())["passes"] if row["name"] == "write_out_silu"]
    assert [reason for _, reason in left[0]] == ["past `most`"] * 2
    assert calque("validate", out, site=example).returncode == 0
    told = json.loads(calque("generate", out, "-p", "The function returns", "--max-new-tokens", 4, "--json", site=example).stdout)
    assert len(told["tokens"]) == 4


@pytest.mark.slow
def test_options_of_a_plugins_target_are_set_and_checked_like_any(example: Path, tmp_path: Path) -> None:
    convert = ("convert", "builtin:quill", "--target", "ort-format", "-o", tmp_path / "out", "--scenarios", "single-prompt")
    wrong = calque(*convert, "--set", "optimise=none", site=example)
    assert wrong.returncode == 2
    assert "did you mean `optimize`?" in wrong.stderr
    done = calque(*convert, "--set", "optimize=none", site=example)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]["options"] == {"optimize": "none"}


def test_layout_that_a_plugins_target_lacks_is_refused(example: Path, tmp_path: Path) -> None:
    convert = ("convert", "builtin:quill", "--target", "ort-format", "-o", tmp_path / "out", "--layout", "transformers.js")
    refused = calque(*convert, site=example)
    assert refused.returncode == 4
    assert "layout: transformers.js  ort-format in fp32 has flat" in refused.stderr


@pytest.mark.slow
def test_artifact_of_a_target_that_is_not_installed_is_refused(example: Path, tmp_path: Path) -> None:
    done = calque("convert", "builtin:quill", "--target", "ort-format", "-o", tmp_path / "out", "--scenarios", "length-1", site=example)
    assert done.returncode == 0, done.stderr
    assert calque("validate", tmp_path / "out").returncode == TargetUnavailable.exit_code
    assert calque("inspect", tmp_path / "out").returncode == 0


def distribution(site: Path, name: str, group: str, entry: str, code: str = "") -> None:
    """``site`` holds a distribution as an installer leaves it, with one module and one entry point."""
    info = site / f"{name}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    (site / f"{name}.py").write_text(code)


PASS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class CacheDynamic:
    after = frozenset()

    def apply(self, model): ...
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_pass_that_is_built_in_too_is_an_error_where_it_is_used(site: Path) -> None:
    distribution(site, "clashing", "calque.passes", "cache_dynamic = clashing:CacheDynamic", PASS)
    with pytest.raises(UsageError, match="cache_dynamic") as caught:
        passes.load("cache_dynamic")
    assert caught.value.where == ("Calque itself", "clashing 2.0, entry point cache_dynamic = clashing:CacheDynamic of calque.passes")
    assert passes.name_of(passes.load("transpose_linear")) == "transpose_linear"
    assert passes.names().count("cache_dynamic") == 1


def test_target_that_two_plugins_bring_is_an_error_that_names_both(site: Path) -> None:
    for name in ("one", "other"):
        distribution(site, name, "calque.targets", f"twin = {name}:Twin")
    with pytest.raises(UsageError, match="twin") as caught:
        targets.load("twin")
    assert [line.split(",")[0] for line in caught.value.where] == ["one 2.0", "other 2.0"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import no_such_sdk", "ModuleNotFoundError: No module named 'no_such_sdk'"),
        ("raise SystemError('no device')", "SystemError: no device"),
        ("", "AttributeError: module 'broken' has no attribute 'Broken'"),
        ("Broken = 3", "it is no dataclass but 3"),
        ("class Broken: ...", "it is no dataclass but <class 'broken.Broken'>"),
        ("from dataclasses import dataclass\n@dataclass\nclass Broken:\n    size: int", "its options need defaults: size"),
        ("from dataclasses import dataclass\n@dataclass\nclass Broken: ...", "it lacks problems, passes, lower, emit, open, doctor"),
    ],
)
def test_broken_target_names_its_distribution_and_harms_no_other_command(
    code: str, expected: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    distribution(site, "broken", "calque.targets", "broken-target = broken:Broken", code)
    with pytest.raises(TargetUnavailable) as caught:
        targets.make("broken-target", {})
    assert caught.value.where[0] == "broken 2.0, entry point broken-target = broken:Broken of calque.targets"
    assert expected in caught.value.where
    assert targets.make("onnxruntime", {}).name == "onnxruntime"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("cache_dynamik = wrong:CacheDynamic", "pass 'cache_dynamik' and class CacheDynamic do not fit"),
        ("CacheDynamic = wrong:CacheDynamic", "pass 'CacheDynamic' and class CacheDynamic do not fit"),
        ("anything = wrong:dataclass", "it is no dataclass but <function dataclass"),
    ],
)
def test_pass_that_is_none_says_what_it_lacks(entry: str, expected: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    distribution(site, "wrong", "calque.passes", entry, PASS)
    with pytest.raises(TargetUnavailable) as caught:
        passes.find(entry.split(" ")[0])
    assert any(line.startswith(expected) for line in caught.value.where)


@pytest.mark.slow
def test_commands_that_do_not_use_a_broken_plugin_work_and_targets_lists_it(tmp_path: Path) -> None:
    distribution(tmp_path, "broken", "calque.targets", "broken-target = broken:Broken", "import no_such_sdk")
    distribution(tmp_path, "useless", "calque.passes", "useless = useless:Useless", "raise ValueError")
    listed = calque("targets", "--json", site=tmp_path)
    assert listed.returncode == 0
    [row] = json.loads(listed.stdout)["broken-target"]
    assert row["status"] == "unusable"
    assert "broken 2.0" in row["note"]
    planned = calque("convert", "builtin:quill", "--target", "onnxruntime", "--plan", site=tmp_path)
    assert planned.returncode == 0, planned.stderr
    used = calque("convert", "builtin:quill", "--target", "broken-target", "--plan", site=tmp_path)
    assert used.returncode == 5
    assert "broken 2.0, entry point broken-target = broken:Broken of calque.targets" in used.stderr
    assert "Traceback" not in used.stderr
