"""The measuring measures: the loop against a graph with a known answer, profiles, medians and ratios, and what is kept."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.conversion.shapes import SHAPES
from benchmarks.conversion.tools import GENAI, OPTIMUM
from benchmarks.decoding.artifacts import ONNX_RUNTIME, code_digest
from benchmarks.decoding.engines.onnx_runtime import Engine
from benchmarks.decoding.loop import decode
from benchmarks.decoding.profile import nodes_of_last_run
from benchmarks.decoding.rounds import Answer, runs, turns
from benchmarks.decoding.run import parse, shown_command
from benchmarks.decoding.tables import Artifact, Measured, Run, figures, first_difference, ratios
from benchmarks.decoding.worker import Failed, Worker
from calque.bench import prompt, rotated

MB = 10**6
VOCABULARY = 97
XS = SHAPES["XS"]
FIGURES = {"first": (2.0, 10.0, 4 * MB, 200), OPTIMUM: (4.0, 5.0, 2 * MB, 300), GENAI: (1.0, 20.0, 4 * MB, 100)}


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    """A graph with a cache as in XS, which holds every token so far; the next is the last one and the sum of the cache."""
    ids, past, present = "input_ids", "past_key_values.0.key", "present.0.key"
    inputs = [
        helper.make_tensor_value_info(ids, TensorProto.INT64, [1, "sequence"]),
        helper.make_tensor_value_info(past, TensorProto.FLOAT, [1, XS.kv_heads, "past", XS.head_dim]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "sequence", VOCABULARY]),
        helper.make_tensor_value_info(present, TensorProto.FLOAT, [1, XS.kv_heads, "total", XS.head_dim]),
    ]
    nodes = [
        helper.make_node("Cast", [ids], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "column"], ["one"]),
        helper.make_node("Expand", ["one", "block"], ["new"]),
        helper.make_node("Concat", [past, "new"], [present], axis=2),
        helper.make_node("ReduceSum", [present], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", [ids, "whole"], ["next"]),
        helper.make_node("Mod", ["next", "depth"], ["tokens"]),
        helper.make_node("OneHot", ["tokens", "depth", "range"], ["logits"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([1, 1, -1, 1]), "column"),
        numpy_helper.from_array(np.array([1, XS.kv_heads, 1, XS.head_dim]), "block"),
        numpy_helper.from_array(np.array(VOCABULARY), "depth"),
        numpy_helper.from_array(np.array([0, 1], np.float32), "range"),
    ]
    graph = helper.make_graph(nodes, "counter", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "model.onnx")
    return tmp_path


def greedy(prompt: list[int], steps: int) -> list[int]:
    """Return what the graph must give."""
    seen = list(prompt)
    for _ in range(steps + 1):
        seen.append((XS.kv_heads * XS.head_dim * sum(seen) + seen[-1]) % VOCABULARY)
    return seen[len(prompt) :]


def measured() -> Measured:
    """Three artifacts over two rounds, the second of which was a slow minute for all."""
    taken = []
    for slow in (1, 3):
        for name, (seconds, rate, _, _) in FIGURES.items():
            differs = 7 if name == OPTIMUM and slow == 3 else None
            taken.append(Run(name, slow, 128, seconds * slow, rate / slow, differs, slow * 10e9))
    artifacts = (Artifact(name, nodes, memory // 2, memory) for name, (_, _, memory, nodes) in FIGURES.items())
    return Measured(tuple(artifacts), tuple(taken), True, {"fourth": "converting ended with exit code -9: `Killed`"})


def test_the_loop_hands_on_the_cache(counter: Path) -> None:
    """Every token depends on all before it, and only the last position's logits count; what the graph lacks is not fed."""
    decoded = decode(Engine(counter, XS, threads=1), [3, 5, 50], 6)
    assert decoded.tokens == greedy([3, 5, 50], 6)
    assert decoded.first_s > 0
    assert decoded.rest_s > 0


def test_a_run_begins_with_an_empty_cache(counter: Path) -> None:
    """The same prompt gives the same tokens a second time."""
    engine = Engine(counter, XS, threads=1)
    assert decode(engine, [3, 5], 2).tokens == decode(engine, [3, 5], 2).tokens


def test_a_profile_counts_the_last_run(counter: Path, tmp_path: Path) -> None:
    """A real profile of one step has a node event for each node that is not constant."""
    engine = Engine(counter, XS, threads=1, profile=tmp_path / "profile")
    decode(engine, [1, 2, 3], 1)
    events = json.loads(Path(engine.session.end_profiling()).read_text(encoding="utf-8"))
    assert nodes_of_last_run(events) == 9


def test_a_profile_counts_neither_other_runs_nor_other_events() -> None:
    """Only kernels within the window of the last run count, wherever it stands in the file."""
    run = {"cat": "Session", "name": "model_run"}
    node = {"cat": "Node", "name": "node_MatMul_1_kernel_time", "dur": 1}
    session = {"cat": "Session", "name": "SequentialExecutor::Execute", "ts": 51, "dur": 5}
    fence = {"cat": "Node", "name": "node_MatMul_1_fence_before", "ts": 54, "dur": 0}
    events: list[dict[str, Any]] = [
        run | {"ts": 50, "dur": 10},
        node | {"ts": 52},
        node | {"ts": 55},
        session,
        fence,
        run | {"ts": 10, "dur": 9},
        node | {"ts": 12},
    ]
    assert nodes_of_last_run(events) == 2


def test_figures_are_medians_with_their_range() -> None:
    """A token that differs in any round shows, so does the rate at which memory was read, and so does who failed."""
    table = figures(measured())
    assert "| first | 4000.0 (2000.0–6000.0) | 6.7 (3.3–10.0) | 4 | 200 | 2.0 | yes |" in table
    assert "| 2 | 300 | 1.0 | from token 7 after 128 |" in table
    assert "at 20.0 (10.0–30.0) GB/s" in table
    assert "- fourth: converting ended with exit code -9: `Killed`" in table


def test_ratios_are_within_each_round() -> None:
    """A slow minute meets both sides of a ratio; above 1, the artifact of the row is faster or takes less."""
    lines = ratios(measured(), (GENAI, OPTIMUM)).splitlines()[2:]
    assert lines == [
        f"| first against {OPTIMUM} | 2.00 | 2.00 | 0.50 | 1.50 | 0.50 |",
        f"| first against {GENAI} | 0.50 | 0.50 | 1.00 | 0.50 | 1.00 |",
    ]


def test_rows_of_a_base_are_not_compared_with_one_another() -> None:
    """Whatever they were told."""
    runs = tuple(Run(name, 1, 128, 1.0, 1.0, None, 1.0) for name in ("ours", GENAI, f"{GENAI}, told otherwise"))
    found = Measured(tuple(Artifact(run.artifact, None, 1, 1) for run in runs), runs, True, {})
    names = [line.split(" | ")[0] for line in ratios(found, (GENAI,)).splitlines()[2:]]
    assert names == [f"| ours against {GENAI}", f"| ours against {GENAI}, told otherwise"]


def test_medians_are_written_for_each_prompt() -> None:
    """What results.json holds can be written as JSON."""
    found = json.loads(json.dumps(measured().as_json()))
    assert found["medians"][0] == {"artifact": "first", "ttft_s_128": 4.0, "decode_tokens_per_s_128": pytest.approx(20 / 3)}
    assert len(found["runs"]) == 6


@pytest.mark.parametrize(("tokens", "index"), [([1, 2, 3], None), ([1, 9, 9], 1), ([9, 2, 3], 0)])
def test_the_first_difference_is_found(tokens: list[int], index: int | None) -> None:
    """None says that every token is the expected one."""
    assert first_difference(tokens, [1, 2, 3]) == index


def test_each_round_begins_with_another_artifact() -> None:
    """Whoever goes first after memory was read is a different one each time."""
    assert [rotated("abc", number) for number in (0, 1, 5)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_a_prompt_is_the_same_each_time() -> None:
    """Its tokens are all of the vocabulary."""
    assert prompt(128, 50) == prompt(128, 50)
    assert len(prompt(128, 50)) == 128
    assert set(prompt(512, 50)) == set(range(50))


def start(folder: Path, logs: Path) -> Worker:
    """Return a worker of the graph in the folder."""
    return Worker(Path(sys.executable), ONNX_RUNTIME, folder, "XS", 1, {}, logs / "worker.log")


def test_a_worker_answers_each_run(counter: Path, tmp_path: Path) -> None:
    """It is a process of its own, stays alive, and says its own peak memory."""
    with start(counter, tmp_path) as worker:
        answers = [worker.decode([1, 2], steps) for steps in (1, 2)]
    assert [answer["tokens"] for answer in answers] == [greedy([1, 2], 1), greedy([1, 2], 2)]
    assert 10 * MB < answers[0]["peak_rss_bytes"] < 500 * MB


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    """There is no graph in the folder, and the message names no folder of the machine."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    with start(folder, tmp_path) as worker, pytest.raises(Failed, match=r"exit code 1: .*WORK/artifact/model.onnx.* doesn't exist"):
        worker.decode([1, 2], 1)


def test_turns_go_round_all_for_each_prompt_where_all_are_alive() -> None:
    """Before the first round all are started; the first of a round is another one each time."""
    assert list(turns("ab", True, 0)) == [("a", (128, 512)), ("b", (128, 512))]
    assert list(turns("ab", True, 1)) == [("b", (128,)), ("a", (128,)), ("b", (512,)), ("a", (512,))]


def test_turns_start_each_once_where_one_is_alive() -> None:
    """Nobody is started in vain."""
    assert list(turns("ab", False, 0)) == []
    assert list(turns("ab", False, 1)) == [("b", (128, 512)), ("a", (128, 512))]


def test_tokens_are_compared_with_those_of_the_first_artifact() -> None:
    """Whoever ran first; what failed is left out."""
    told = {"b": [1, 5], "a": [1, 2], "lost": [7, 7]}
    answers = [Answer(name, 1, 128, {"tokens": tokens, "first_s": 1.0, "rest_s": 2.0}, 1.0) for name, tokens in told.items()]
    found = runs(answers, ["a", "b"])
    assert [(run.artifact, run.differs, run.decode_tokens_per_s) for run in found] == [("b", 1, 32.0), ("a", None, 32.0)]


def test_code_counts_where_it_is_linked_to(tmp_path: Path) -> None:
    """A change in a folder that the package links to makes its artifacts anew."""
    linked = tmp_path / "passes"
    linked.mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "passes").symlink_to(linked)
    (linked / "one.py").write_text("a = 1\n", encoding="utf-8")
    before = code_digest(tmp_path / "package")
    assert code_digest(tmp_path / "package") == before
    (linked / "one.py").write_text("a = 2\n", encoding="utf-8")
    assert code_digest(tmp_path / "package") != before


def test_the_shape_is_that_of_qwen2_5_0_5b() -> None:
    """The number of parameters is that of the published checkpoint, biases included."""
    tensors = SHAPES["M"].tensors()
    assert sum(math.prod(dims) for dims in tensors.values()) == 494_032_768
    assert tensors["model.layers.23.self_attn.k_proj.bias"] == (128,)


def test_the_command_names_no_folder() -> None:
    """What is published names no path of the machine."""
    args = parse(["--shapes", "S", "--rounds", "5", "--work", "/somewhere", "--results", "/elsewhere"])
    assert shown_command(args, "S") == "python -m benchmarks.decoding.run --shapes S --rounds 5 --threads 2"
