"""The script that runs a TensorRT engine, on a fake GPU: it accepts what is right, and what is wrong makes it fail."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from calque.artifact import Artifact
from calque.runtime import open_session
from calque.validation.compare import compare
from calque.validation.drive import ModelIO
from calque.validation.reference import read_references
from tests.targets.tensorrt_folder import SLOTS, Gpu, Ran, decoder, encoder, profile

SCRIPTS = Path(__file__).parents[2] / "targets" / "tensorrt_package"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def gpu(package: Path, tmp_path: Path) -> Gpu:
    return Gpu.over(package, tmp_path)


def launches(text: str) -> int:
    return int(text.split("graphs were launched ")[1].split()[0])


@pytest.fixture(scope="module")
def ran(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """How the script ends over a right engine."""
    gpu = Gpu.over(package, tmp_path_factory.mktemp("right"))
    gpu.build()
    return gpu.run()


def test_a_right_engine_passes_every_scenario_as_the_gate_does(package: Path, ran: Ran) -> None:
    assert ran.code == 0, ran.text
    artifact = Artifact.read(package)
    io = ModelIO.of(artifact)
    session = open_session(package)
    for scenario, references in read_references(package):
        line = ran.line(scenario.name)
        if scenario.refuse:
            assert line["status"] == ("passed" if "max_length" in scenario.refuse else "not_run"), line
            continue
        expected = compare(session, io, scenario, references)
        assert (line["status"], line["limit"]) == (expected["status"], expected["limit"])
        assert line["max_sigma"] == pytest.approx(expected["worst_sigma"], rel=1e-3), scenario.name
        assert line["mean_sigma"] == pytest.approx(expected["mean_sigma"], rel=1e-3)
        assert line["tokens_agreed"] == line["tokens"] - len(line["near_ties"]) > 0
        assert line["tokens"] == expected["positions"]


def test_it_measures_what_it_says(package: Path, ran: Ran) -> None:
    said = ran.said
    assert {"sdk", "version", "device", "max_sigma", "mean_sigma", "tokens_agreed", "tokens", "scenarios"} < set(said)
    assert {"prefill_ms", "decode_ms", "tokens_per_second", "roofline_percent", "cuda_graph"} < set(said)
    assert (said["sdk"], said["version"], said["device"], said["cuda_graph"]) == ("tensorrt", "11.4.0", "Fake GPU", True)
    assert said["tokens_per_second"] == pytest.approx(1000 / said["decode_ms"])
    # The fake plan holds no weights: it is the smaller of the two.
    assert 0 < said["weight_bytes"] < (package / "model.onnx.data").stat().st_size
    assert said["roofline_percent"] == pytest.approx(100 * said["tokens_per_second"] * said["weight_bytes"] / 10e9)
    assert "9 tokens of prompt" in ran.text
    assert launches(ran.text) > 30


def test_the_bandwidth_is_measured_and_lengths_are_cut_to_the_slots(gpu: Gpu) -> None:
    gpu.build()
    other = gpu.run("--prompt-tokens", "900", "--new-tokens", "20", bandwidth=None)
    assert other.code == 0, other.text
    assert other.said["bandwidth_gb_s"] > 0.1
    assert f"{SLOTS - 20} tokens of prompt" in other.text


def test_without_a_graph_the_numbers_are_the_same(gpu: Gpu, ran: Ran) -> None:
    gpu.build()
    for other in (gpu.run("--no-cuda-graph"), gpu.run(FAKE_NO_CAPTURE="1")):
        assert (other.code, other.said["cuda_graph"], launches(other.text)) == (0, False, 0)
        assert other.said["scenarios"] == ran.said["scenarios"]
    assert "not permitted when stream is capturing" in other.text


def test_tensorrt_rtx_replays_graphs_by_itself(gpu: Gpu, ran: Ran) -> None:
    gpu.build()
    other = gpu.run(sdk="tensorrt_rtx")
    assert (other.code, other.said["sdk"], other.said["cuda_graph"], launches(other.text)) == (0, "tensorrt_rtx", True, 0)
    assert other.said["scenarios"] == ran.said["scenarios"]


def test_prefill_and_decode_may_have_a_profile_each(gpu: Gpu, ran: Ran) -> None:
    gpu.build(profiles=[profile(gpu.package, "prefill", (1, 2), (5, SLOTS)), profile(gpu.package, "decode", (1, 1), (5, 1))])
    other = gpu.run()
    assert (other.code, other.said["cuda_graph"]) == (0, True), other.text
    assert other.said["scenarios"] == ran.said["scenarios"]


def test_prompts_wider_than_the_profile_go_in_pieces(gpu: Gpu) -> None:
    gpu.build(profiles=[profile(gpu.package, "narrow", (1, 1), (3, 16))])
    other = gpu.run()
    assert other.code == 0, other.text
    assert other.line("untraced-length")["status"] == "passed"
    assert other.line("batch-5") == {
        **other.line("batch-5"),
        "status": "not_run",
        "reason": "of sizes that the engine's profiles do not take",
    }


@pytest.mark.parametrize("fault", ["ignores write_indices", "NaN", "swapped outputs", "one step late"])
def test_an_engine_that_is_wrong_is_found_out(gpu: Gpu, fault: str) -> None:
    gpu.build(fault)
    ran = gpu.run()
    assert ran.code == 3, ran.text
    assert "the numbers are WRONG" in ran.text
    assert ran.line("single-prompt")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run_engine.py", '"write_indices": held,', '"write_indices": held * 0,'),
        ("run_engine.py", "held + new.sum(axis=1),", "held,"),
        ("run_engine.py", "np.clip(held[:, None] + ", "np.clip("),
        ("run_engine.py", "            held = held + (index != PAD).sum(axis=1)\n", ""),
        ("cuda_engine.py", "            raise Refused(", "            print("),
        ("cuda_engine.py", "self.graph, self.ran, self.shapes = 0, False, shapes", "self.ran, self.shapes = False, shapes"),
        ("cuda_engine.py", "        self.cuda.synchronize()\n        return {", "        return {"),
        ("run_engine.py", "            engine.reset()\n", ""),  # half floats of fresh memory are NaN here
    ],
)  # fmt: skip
def test_a_script_that_drives_the_engine_wrongly_fails(gpu: Gpu, file: str, old: str, new: str) -> None:
    gpu.build()
    script = gpu.package / file
    text = script.read_text()
    assert text.count(old) == 1
    script.write_text(text.replace(old, new))
    assert gpu.run().code in (1, 3)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dtype", "past_key_values.0.key: the engine has FLOAT, the manifest HALF"),
        ("copied states", "shares its memory with None"),
        ("narrow output", "logits: (2, 5, 1), the manifest says (2, 5, 211)"),
    ],
)
def test_an_engine_that_is_not_the_manifest_s_is_not_run(gpu: Gpu, fault: str, words: str) -> None:
    gpu.build(fault)
    ran = gpu.run()
    assert ran.code == 1
    assert any(words in line for line in ran.said["problems"]), ran.said["problems"]


def test_what_is_missing_is_named(gpu: Gpu) -> None:
    ran = gpu.run()
    assert (ran.code, "run build_engine.py first" in ran.said["error"]) == (1, True)
    (gpu.package / "model.plan").write_bytes(b"of another version")
    ran = gpu.run()
    assert (ran.code, ran.said["problems"]) == (5, ["Serialization assertion magicTagRead == kMAGIC_TAG failed"])
    ran = gpu.run(FAKE_GPUS="0")
    assert (ran.code, "no NVIDIA GPU here" in ran.said["error"]) == (5, True)
    gpu.build()
    ran = gpu.run(FAKE_MEMORY="3000")
    assert (ran.code, ran.said["error"]) == (1, "cudaMalloc: out of memory")
    for file in (gpu.package / "reference").iterdir():
        file.unlink()
    assert "holds nothing to compare with" in gpu.run().said["error"]


def test_no_sdk_or_no_cuda_is_exit_5(gpu: Gpu) -> None:
    ran = gpu.run("--sdk", "tensorrt_rtx", PYTHONPATH="", LD_LIBRARY_PATH="")
    assert ran.code == 5
    assert "no CUDA runtime" in ran.said["error"] or "no NVIDIA GPU" in ran.said["error"] or "no TensorRT" in ran.said["error"]


@pytest.mark.slow
def test_encoders_are_compared_without_states(tmp_path: Path) -> None:
    encoder_gpu = Gpu.over(encoder(tmp_path / "encoder"), tmp_path)
    encoder_gpu.build()
    ran = encoder_gpu.run()
    assert ran.code == 0, ran.text
    assert ran.line("ragged-right")["status"] == ran.line("past-full-length")["status"] == "passed"
    assert ran.said["tokens_agreed"] == ran.said["tokens"] > 0
    encoder_gpu.build("ignores padding")
    assert encoder_gpu.run().code == 3


def test_the_fake_has_no_name_that_the_real_one_lacks() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    tree = ast.parse((Path(__file__).parent / "fake_tensorrt.py").read_text())
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name != "Severity"}
    missing = [name for name in classes if not hasattr(real, name)]
    for name, node in classes.items():
        members = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
        members |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                    and isinstance(part.value, ast.Name) and part.value.id == "self"}  # fmt: skip
        missing += [f"{name}.{member}" for member in members if member[0] != "_" and not hasattr(getattr(real, name), member)]
    assert missing == []


def test_bfloat16_is_read_from_its_bits() -> None:
    spec = importlib.util.spec_from_file_location("cuda_engine", SCRIPTS / "cuda_engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bits = np.array([[0x3F80, 0xC000], [0x7FC0, 0x0001]], dtype=np.uint16)
    found = module.as_float(bits, "bfloat16")
    assert found[0].tolist() == [1.0, -2.0]
    assert np.isnan(found[1, 0])
    assert 0 < found[1, 1] < 1e-38


def definitions(path: Path) -> dict[str, str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_scripts_need_numpy_alone_and_share_what_each_must_carry() -> None:
    found: dict[str, dict[str, str]] = {}
    for path in sorted(SCRIPTS.glob("*.py")):
        found[path.name] = definitions(path)
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name if isinstance(node, ast.Import) else str(node.module) for node in imports for alias in node.names}
        assert {name.split(".")[0] for name in names} - sys.stdlib_module_names <= {"numpy", "cuda_engine"}
    assert set(found) == {"build_engine.py", "cuda_engine.py", "run_engine.py"}
    shared = set(found["build_engine.py"]) & set(found["cuda_engine.py"])
    assert shared == {"Failed", "load_sdk", "make_log"}
    assert [name for name in shared if found["build_engine.py"][name] != found["cuda_engine.py"][name]] == []
