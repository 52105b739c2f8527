"""The script that builds a TensorRT engine, run with TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import enum
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest

from calque.targets._tensorrt_package import run_build
from tests.targets.tensorrt_folder import SLOTS, decoder, profile

SCRIPT = Path(__file__).parents[2] / "targets" / "tensorrt_package" / "build_engine.py"
RTX = "tensorrt_rtx"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(RTX)
    return decoder(tmp_path_factory.mktemp("decoder"), "single-prompt")


@pytest.fixture
def folder(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "package"))


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_engine", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, *words: str) -> dict[str, Any]:
    """The build fails with those words, and leaves nothing."""
    before = {path.name for path in folder.iterdir()}
    said = run_build(folder, RTX)
    assert said["exit_code"] == 1
    text = "\n".join([said["error"], *said["problems"]])
    assert [word for word in words if word not in text] == [], text
    assert {path.name for path in folder.iterdir()} == before
    return said


def test_the_engine_is_built_and_described(folder: Path) -> None:
    said = run_build(folder, RTX, threads=1)
    assert said["exit_code"] == 0, said
    assert (said["sdk"], said["onnx"], said["engine"]) == (RTX, "model.onnx", str(folder / "model.plan"))
    assert said["version"].startswith("1.")
    assert said["plan_bytes"] == (folder / "model.plan").stat().st_size > (folder / "model.onnx.data").stat().st_size
    assert said["peak_rss_bytes"] > 50_000_000
    assert 0 < said["parse_seconds"] < 60
    assert 0 < said["build_seconds"] < 60
    assert said["aliases"] == {f"present.{i}.{kind}": f"past_key_values.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")}
    dtypes = {tensor["name"]: tensor["dtype"] for tensor in said["tensors"]}
    assert (dtypes["kv_lengths"], dtypes["present.0.key"], dtypes["logits"]) == ("INT32", "HALF", "FLOAT")
    assert [line for line in said["warnings"] if "binding" not in line] == []
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_two_profiles_and_another_place_for_the_plan(folder: Path, tmp_path: Path) -> None:
    profiles = [profile(folder, "prefill", (1, 1), (4, SLOTS)), profile(folder, "decode", (1, 1), (4, 1))]
    edit(folder, "profiles.json", profiles=profiles)
    edit(folder, "build.json", cleared_builder_flags=["TF32"], compute_capabilities=["SM89"], memory_pool_limits={"WORKSPACE": 1 << 28})
    said = run_build(folder, RTX, engine=tmp_path / "there.plan")
    assert said["exit_code"] == 0, said
    assert (tmp_path / "there.plan").stat().st_size == said["plan_bytes"]
    assert not (folder / "model.plan").exists()


def test_names_that_the_sdk_lacks_are_refused_with_those_it_has(folder: Path) -> None:
    for change in ({"builder_flags": ["FP16"]}, {"network_flags": ["EXPLICIT_BATCH"]}, {"memory_pool_limits": {"HEAP": 1}}):
        edit(folder, "build.json", builder_flags=[], network_flags=[], memory_pool_limits={})
        edit(folder, "build.json", **change)
        refused(folder, "in this version", "it has ")


def test_the_parser_s_words_come_with_the_node(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.attribute.append(onnx.helper.make_attribute("softmax_precision", 1))
    onnx.save(model, folder / "model.onnx")
    refused(folder, "the parser refuses the model", f"{node.name} [Attention]: ", "Setting softmax precision is not supported")


def test_the_builder_s_words_are_kept(folder: Path) -> None:
    # Plans without weights take a GPU, as the builder says to its logger alone.
    edit(folder, "build.json", builder_flags=["STRIP_PLAN"])
    (folder / "model.plan").write_bytes(b"the last that was good")
    said = refused(folder, "the builder refuses the network")
    assert said["problems"] != ["it said nothing"]
    assert (folder / "model.plan").read_bytes() == b"the last that was good"


def test_profiles_must_fit_the_network(folder: Path) -> None:
    [known] = json.loads((folder / "profiles.json").read_text())["profiles"]
    shapes = known["shapes"]
    wide = {"min": [1, 1], "opt": [1, 8], "max": [1]}
    for changed, word in (
        ({name: shape for name, shape in shapes.items() if name != "kv_lengths"}, "kv_lengths (-1,): no range of shapes"),
        (shapes | {"attention_mask": shapes["input_ids"]}, "attention_mask: the network has no such input"),
        (shapes | {"input_ids": {"min": [1, 1]}}, "input_ids: {'min': [1, 1]} is no range"),
        (shapes | {"input_ids": wide}, "input_ids"),
        (
            shapes | {"past_key_values.0.key": {end: [1, 2, SLOTS + 1, 24] for end in ("min", "opt", "max")}},
            "Dimension mismatch for tensor past_key",
        ),
    ):
        edit(folder, "profiles.json", profiles=[{"name": "default", "shapes": changed}])
        refused(folder, word)


def test_states_that_are_not_written_in_place_are_refused(folder: Path) -> None:
    states = json.loads((folder / "manifest.json").read_text())["states"]
    states[0]["input"] = states[1]["input"]
    edit(folder, "manifest.json", states=states)
    refused(folder, "does not write its states in place", "present.0.key is not past_key_values.0.value in place")


def test_a_model_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    refused(folder, "model.onnx is not there")
    (folder / "build.json").write_text("{")
    assert run_build(folder, RTX)["exit_code"] == 1


def test_without_an_sdk_it_says_what_to_install(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    # -I -S: the standard library alone.
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "build_engine.py", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 5
    said = json.loads(ended.stdout.splitlines()[-1])
    assert "pip install tensorrt" in said["error"]
    assert [line.split(":")[0] for line in said["problems"]] == ["tensorrt", "tensorrt_rtx"]


def test_strong_typing_is_asked_for_where_it_is_a_choice(script: ModuleType) -> None:
    class Flags10(enum.IntEnum):
        EXPLICIT_BATCH, STRONGLY_TYPED = range(2)

    class Flags12(enum.IntEnum):
        PREFER_SOMETHING = 0

    builder = SimpleNamespace(create_network=lambda flags: flags)
    for flags, expected in ((Flags10, 0b10), (Flags12, 0)):
        trt = SimpleNamespace(NetworkDefinitionCreationFlag=flags)
        assert script.make_network(trt, builder, ["STRONGLY_TYPED"]) == expected


def test_lengths_that_a_parser_drops_are_missed(tmp_path: Path) -> None:
    """As releases before 11.1 drop them, which look for them at another place."""
    pytest.importorskip(RTX)
    folder = decoder(tmp_path, "single-prompt", attention="trt")
    assert json.loads((folder / "build.json").read_text())["attention_lengths"] == 2
    assert run_build(folder, RTX)["exit_code"] == 0
    (folder / "model.plan").unlink()
    model = onnx.load(folder / "model.trt.onnx", load_external_data=False)
    [own, _] = [node for node in model.graph.node if node.op_type == "TRT_Attention"]
    own.input[:] = [*own.input[:5], "", own.input[5]]
    onnx.save(model, folder / "model.trt.onnx")
    refused(folder, "1 of 2 attentions know their rows' lengths", "TensorRT 11.1")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("build.json", "[]", "build.json is no file of schema 1"),
        ("build.json", '{"schema": 1}', "build.json lacks onnx, engine"),
        ("build.json", '{"schema": 1, "onnx"', "build.json cannot be read"),
        ("profiles.json", '{"schema": 1, "profiles": []}', "profiles.json lacks profiles"),
        ("profiles.json", '{"schema": 2, "profiles": [1]}', "profiles.json is no file of schema 1"),
    ],
)
def test_a_damaged_description_is_named(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    refused(folder, words)


def test_weights_that_are_not_there_are_named(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    refused(folder, "model.onnx.data is not there")
