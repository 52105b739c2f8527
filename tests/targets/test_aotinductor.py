"""Packages of AOTInductor: what they compute and at which shapes, what is in them and what is not, and what is refused."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import calque
from calque import passes, pipeline
from calque.artifact import DECODE, PREFILL, SHARED_WEIGHTS, Artifact, file_sha256
from calque.choices import Precision
from calque.errors import ArtifactUnreadable, ParityFailed, TargetUnavailable, UsageError
from calque.passes.pack_panels import PackPanels
from calque.quality_gate import model_bytes
from calque.recipe import Recipe
from calque.runtime import aotinductor_session
from calque.runtime.aotinductor_session import MODEL, AOTInductorSession, mapped
from calque.runtime.decoder import Decoder
from calque.targets._aotinductor_weights import integers
from calque.targets.aotinductor import AOTInductor
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from tests.tiny_encoders import save_encoder
from tests.tiny_models import TYPES, Tiny, save_random, traced_as

ONE_LAYER = replace(TYPES["llama"], layers=1, vocabulary=53)
ROOT = Path(__file__).parents[2]


def emitted(folder: Path, tiny: Tiny, precision: str, **options: Any) -> tuple[Artifact, TracedModel]:
    """The artifact in the folder, not proved, and the graph that it was written from."""
    target, model = AOTInductor(**options), traced_as(tiny)
    done = passes.run(target.passes(precision), model)
    made = target.emit(target.lower(model), model, folder)
    recipe = {"options": options}
    artifact = Artifact(folder, "aotinductor", recipe, {}, precision, {}, made.graphs, model.states, done, {}, made.limits)
    return artifact, model


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, TracedModel]:
    return emitted(tmp_path_factory.mktemp("single"), ONE_LAYER, "int4")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, TracedModel]:
    return emitted(tmp_path_factory.mktemp("split"), ONE_LAYER, "int4", graphs="split")


def feed(model: TracedModel, rows: int, new: int, past: int) -> dict[str, Any]:
    generator = np.random.default_rng(rows + 10 * new + 100 * past)
    inputs: dict[str, Any] = {
        "input_ids": generator.integers(3, ONE_LAYER.vocabulary, (rows, new)),
        "attention_mask": np.ones((rows, past + new), np.int64),
        "position_ids": np.broadcast_to(np.arange(past, past + new), (rows, new)).copy(),
    }
    for state in model.states:
        inputs[state.input] = generator.standard_normal((rows, int(state.shape[1]), past, int(state.shape[3])), dtype=np.float32)
    return inputs


@pytest.mark.parametrize(("rows", "new", "past"), [(2, 7, 0), (1, 1, 0), (1, 1, 20), (3, 4, 9), (2, 1, 7), (1, 2, 1)])
def test_a_package_gives_what_the_graph_gives_at_any_shape(single: tuple[Artifact, TracedModel], rows: int, new: int, past: int) -> None:
    artifact, model = single
    inputs = feed(model, rows, new, past)
    expected: dict[str, Any] = dict(TracedSession(model)("model", inputs))
    found: dict[str, Any] = AOTInductorSession(artifact, 1, exact=True)(MODEL, inputs)
    rounded: dict[str, Any] = AOTInductorSession(artifact, 1)(MODEL, inputs)
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 2e-5 * max(1.0, float(np.abs(values).max()))
    off = np.abs(rounded["logits"] - expected["logits"]).max() / expected["logits"].std()
    assert 1e-4 < off < 0.2, "it rounds, and no more than 8 bits do"


@pytest.mark.slow
def test_both_packages_read_one_file_that_is_mapped_once(split: tuple[Artifact, TracedModel]) -> None:
    artifact, model = split
    session = AOTInductorSession(artifact, 1)
    for new in (3, 1):
        session(str(artifact.graph_for(new)), feed(model, 1, new, 4))
        expected: dict[str, Any] = dict(TracedSession(model)("model", feed(model, 1, new, 4)))
        found: dict[str, Any] = AOTInductorSession(artifact, 1, exact=True)(str(artifact.graph_for(new)), feed(model, 1, new, 4))
        for name, values in expected.items():
            assert np.abs(found[name] - values).max() <= 2e-5 * max(1.0, float(np.abs(values).max()))
    weights = session.weights()
    starts = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert len(starts) == 1
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert sum(str(artifact.folder / SHARED_WEIGHTS) in line for line in maps) >= 1
    files = sorted(artifact.folder.iterdir())
    assert [path.name for path in files] == ["decode.pt2", SHARED_WEIGHTS, "prefill.pt2"]
    assert model_bytes(artifact) == sum(path.stat().st_size for path in files)


def test_a_package_has_code_alone_and_no_place_of_this_machine(single: tuple[Artifact, TracedModel]) -> None:
    artifact, _ = single
    for graph in artifact.graphs.values():
        with zipfile.ZipFile(artifact.folder / graph.file) as package:
            names = package.namelist()
            [code] = [package.read(name) for name in names if name.endswith(".so")]
        assert not [name for name in names if name.endswith(".cpp")]
        for place in (str(ROOT), str(artifact.folder), str(Path(torch.__file__).parent), os.path.expanduser("~")):
            assert place.encode() not in code


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 code")
def test_portable_code_has_vectors_of_512_bits_only_where_the_processor_was_asked(
    single: tuple[Artifact, TracedModel], tmp_path: Path
) -> None:
    artifact, _ = single
    with zipfile.ZipFile(artifact.folder / "model.pt2") as package:
        [name] = [name for name in package.namelist() if name.endswith(".so")]
        code = package.extract(name, tmp_path)
    listing = subprocess.run(["objdump", "-d", code], capture_output=True, text=True, check=True).stdout
    lines = [(int(at, 16), line) for at, line in re.findall(r"^ +([0-9a-f]+):(.+[xyz]mm.+)$", listing, flags=re.MULTILINE)]
    wide, asked = ([at for at, line in lines if word in line] for word in ("zmm", "vpdpbusd"))
    assert lines
    # There are no names, but what is unwound is told by function.
    frames = subprocess.run(["readelf", "--debug-dump=frames-interp", code], capture_output=True, text=True, check=True).stdout
    for begin, end in re.findall(r" pc=([0-9a-f]+)\.\.([0-9a-f]+)", frames):
        body = range(int(begin, 16), int(end, 16))
        if any(at in body for at in wide):
            assert any(at in body for at in asked), "of our own bodies, which run where the processor has vpdpbusd"


def test_integers_are_those_of_the_pass(single: tuple[Artifact, TracedModel]) -> None:
    artifact, _ = single
    model = traced_as(ONE_LAYER)
    passes.run([rewrite for rewrite in AOTInductor().passes("int4") if not isinstance(rewrite, PackPanels)], model)
    found = integers(artifact.folder / "model.safetensors")
    names = {name.removesuffix(".q") for name in model.weights.entries if name.endswith(".q")}
    assert found.keys() == names
    for name, (q, scale) in found.items():
        assert torch.equal(q, model.weights[f"{name}.q"].read())
        assert torch.equal(scale, model.weights[f"{name}.scale"].read())


@pytest.mark.slow
def test_a_decoder_drives_both_graphs(split: tuple[Artifact, TracedModel]) -> None:
    artifact, _ = split
    session = AOTInductorSession(artifact, 1)
    called: list[str] = []

    def noted(graph: str, inputs: Any) -> Any:
        called.append(graph)
        return session.run(graph, inputs)

    decoder = Decoder(artifact, session, rows=2)
    decoder._states._run = noted  # type: ignore[union-attr]
    tokens = np.array([[5, 9, 7], [3, 4, 6]])
    decoder(tokens)
    step: Any = decoder(np.array([[8], [2]]))
    assert called == [PREFILL, DECODE]
    whole: Any = Decoder(artifact, session, rows=2)(np.concatenate([tokens, [[8], [2]]], 1))
    np.testing.assert_allclose(step[:, -1], whole[:, -1], atol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "gone", "header", "other"])
def test_weights_that_are_not_whole_are_refused_before_anything_runs(
    single: tuple[Artifact, TracedModel], tmp_path: Path, damage: str
) -> None:
    artifact, model = single
    for path in artifact.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / SHARED_WEIGHTS
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-7])
    elif damage == "header":
        file.write_bytes(data[:40])
    else:
        file.write_bytes(re.sub(b"model.norm.weight", b"model.norm.weighs", data))
    session = AOTInductorSession(replace(artifact, folder=tmp_path), 1)
    with pytest.raises(ArtifactUnreadable) as caught:
        session(MODEL, feed(model, 1, 2, 0))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("input_ids", ONE_LAYER.vocabulary, "input_ids  53, 0 to 52 expected"),
        ("input_ids", -1, "input_ids  -1, 0 to 52 expected"),
        ("position_ids", 9, "position_ids  9, 0 to 8 expected"),
    ],
)
def test_what_is_beyond_a_table_is_refused_since_it_would_end_the_process(
    single: tuple[Artifact, TracedModel], tmp_path: Path, name: str, value: int, line: str
) -> None:
    artifact, model = single
    for file in artifact.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": ONE_LAYER.vocabulary}}))
    session = AOTInductorSession(replace(artifact, folder=tmp_path, limits=replace(artifact.limits, max_length=9)), 1)
    inputs = feed(model, 1, 3, 0)
    inputs[name][0, -1] = value
    with pytest.raises(UsageError, match="no such rows") as caught:
        session(MODEL, inputs)
    assert caught.value.where == (line,)


def test_a_package_for_another_processor_is_refused(single: tuple[Artifact, TracedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, model = single
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(TargetUnavailable, match="compiled for x86_64 with AVX2"):
        AOTInductorSession(artifact, 1)(MODEL, feed(model, 1, 2, 0))


@pytest.mark.slow
def test_code_for_this_very_processor_passes_the_gate_and_is_refused_on_a_lesser_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_random(ONE_LAYER, tmp_path / "model")
    recipe = Recipe(model=str(folder), target="aotinductor", precision="int8", options={"march": "native"})
    artifact = pipeline.convert(recipe, tmp_path / "out")
    assert artifact.proof.numerics.status == "passed"
    lesser = tmp_path / "cpuinfo"
    lesser.write_text("processor : 0\nflags : fpu smep avx2\n")
    had = aotinductor_session.extensions()
    monkeypatch.setattr(aotinductor_session, "PROCESSOR", lesser)
    assert aotinductor_session.extensions() == ["avx2"]
    with pytest.raises(TargetUnavailable, match="has more than this one") as caught:
        AOTInductorSession(artifact, 1).opened(MODEL)
    assert caught.value.where == tuple(name for name in had if name != "avx2")


def test_an_option_without_effect_is_refused() -> None:
    model = traced_as(ONE_LAYER)
    assert AOTInductor(graphs="split").problems(model) == []
    model.states = ()
    assert [problem.node for problem in AOTInductor(graphs="split").problems(model)] == ["graphs: split"]
    assert AOTInductor().problems(model) == []


@pytest.mark.slow
def test_a_converter_that_drops_the_state_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lower = AOTInductor.lower

    def forgetful(self: AOTInductor, model: TracedModel) -> Any:
        broken = model.copy()
        for node in list(broken.graph.nodes):
            if node.target is torch.ops.aten.cat.default and "past" in str(node.args[0]):
                # What is handed on forgets, while this call itself computes rightly.
                with broken.graph.inserting_after(node):
                    new = broken.graph.call_function(torch.ops.aten.mul.Tensor, (node, 0.0))
                    new.meta = dict(node.meta)
                outputs: Any = broken.output_node()
                outputs.args = (tuple(new if value is node else value for value in outputs.args[0]),)
        broken.finish_rewrite()
        return lower(self, broken)

    monkeypatch.setattr(AOTInductor, "lower", forgetful)
    folder = save_random(ONE_LAYER, tmp_path / "model")
    with pytest.raises(ParityFailed) as caught:
        pipeline.convert(Recipe(model=str(folder), target="aotinductor"), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_conversions_give_the_same_bytes_and_leave_nothing(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        emitted(folder, ONE_LAYER, "int8")
        digests.append({path.name: file_sha256(path) for path in folder.iterdir()})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"model.pt2", SHARED_WEIGHTS}


GENERATORS = [(name, precision) for name in ("llama", "qwen3", "gemma3_text", "phi3", "gpt2") for precision in AOTInductor.precisions]


# At near ties bfloat16 chooses other experts than float32, on any target.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [*GENERATORS, *(("mixtral", precision) for precision in ("fp32", "int8", "int4"))])
def test_the_gate_passes_generators(name: str, precision: Precision, tmp_path: Path) -> None:
    folder = save_random(TYPES[name], tmp_path / "model")
    artifact = pipeline.convert(Recipe(model=str(folder), target="aotinductor", precision=precision), tmp_path / "out")
    assert artifact.proof.execution.status == "passed"
    assert artifact.proof.numerics.by == "aotinductor"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_gate_passes_an_encoder(precision: Precision, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", "bert")
    artifact = pipeline.convert(
        Recipe(model=str(folder), target="aotinductor", task="feature-extraction", precision=precision), tmp_path / "out"
    )
    assert artifact.proof.execution.status == "passed"


@pytest.mark.slow
def test_the_loader_in_cpp_gives_the_tokens_of_the_session(split: tuple[Artifact, TracedModel], tmp_path: Path) -> None:
    artifact, model = split
    source = ROOT / "docs" / "targets" / "aotinductor"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", source, "-B", tmp_path, prefix, "-DCMAKE_BUILD_TYPE=Release"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    state, prompt, steps = model.states[0], [5, 9, 7], 6
    decoder = Decoder(artifact, AOTInductorSession(artifact, 1))
    given, expected = np.array([prompt]), []
    for _ in range(steps):
        expected.append(int(decoder(given)[0, -1].argmax()))
        given = np.array([[expected[-1]]])
    shape = [str(len(model.states) // 2), str(state.shape[1]), str(state.shape[3]), str(steps)]
    asked = [str(artifact.folder), *shape, *map(str, prompt)]
    run = subprocess.run([tmp_path / "run", *asked], check=True, capture_output=True, text=True)
    assert [int(line) for line in run.stdout.split()] == expected
    for at, wrong in ((0, "nowhere"), (1, "x"), (1, "7"), (6, "-1")):
        failed = subprocess.run([tmp_path / "run", *asked[:at], wrong, *asked[at + 1 :]], check=False, capture_output=True, text=True)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert failed.stderr.startswith("run: ")
    assert mapped(artifact.folder / SHARED_WEIGHTS)


def test_a_gpu_that_is_not_here_is_said_before_any_work(tmp_path: Path) -> None:
    recipe = Recipe(model="no/such", target="aotinductor", options={"device": "cuda"})
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TargetUnavailable, match="NVIDIA GPU"):
        calque.convert(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_has_slots_and_no_integers() -> None:
    names = [passes.name_of(rewrite) for rewrite in AOTInductor(device="cuda").passes("bf16")]
    assert "cache_static" in names
    assert "cast_precision" in names
    with pytest.raises(UsageError, match="no int4"):
        AOTInductor(device="cuda").passes("int4")
    with pytest.raises(ValueError, match="march: native"):
        AOTInductor(device="cuda", march="native")
