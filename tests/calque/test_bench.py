from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calque import cli
from calque.artifact import Artifact, GraphSpec, Limits, TensorSpec
from calque.bandwidth import bandwidth
from calque.bench import Bench, Worker, bench, prompt, rotated
from calque.bench_figures import Run, Subject, bench_text, percentiles, results
from calque.errors import ArtifactUnreadable, CalqueError, Unsupported, UsageError
from tests.runtime.cached import write_grouped
from tests.runtime.counting import Counting, write_counting

SHORT = Bench((3,), new_tokens=4, rounds=2, threads=1)
SUBJECTS = [Subject(name, "generator", "onnxruntime", "fp32", None, 9, size) for name, size in (("a", 10**9), ("b", None))]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory is not read in tests of what surrounds it; the threads it was asked for."""
    asked: list[int] = []

    def read(threads: int) -> float:
        asked.append(threads)
        return 1e10

    monkeypatch.setattr("calque.bench.bandwidth", read)
    return asked


def write_encoder(folder: Path, limits: Limits | None = None, extra: str | None = None) -> Artifact:
    """A table that tokens are looked up in, times a matrix of 4 to 4."""
    specs = [TensorSpec(name, "int64", ("batch_size", "sequence_length")) for name in ("input_ids", extra) if name]
    out = TensorSpec("last_hidden_state", "float32", ("batch_size", "sequence_length", 4))
    weights = [numpy_helper.from_array(np.ones((size, 4), np.float32), name) for size, name in ((9, "table"), (4, "matrix"))]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"]), helper.make_node("MatMul", ["rows", "matrix"], [out.name])]
    inputs = [helper.make_tensor_value_info(spec.name, TensorProto.INT64, list(spec.shape)) for spec in specs]
    outputs = [helper.make_tensor_value_info(out.name, TensorProto.FLOAT, list(out.shape))]
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, weights)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 9}))
    graphs = {"model": GraphSpec("model.onnx", tuple(specs), (out,))}
    artifact = Artifact(folder, "onnxruntime", {}, {}, "fp32", {}, graphs, (), {}, {}, limits or Limits())
    artifact.write_manifest()
    return artifact


def write_generators(folder: Path, *limits: Limits) -> list[Path]:
    folders = [folder / f"generator-{number}" for number in range(len(limits))]
    for one, limit in zip(folders, limits, strict=True):
        one.mkdir()
        write_counting(one, Counting(limit))
    return folders


def test_generators_are_measured_side_by_side(tmp_path: Path, rates: list[int]) -> None:
    folders = [*write_generators(tmp_path, Limits(max_length=6)), write_grouped(tmp_path / "grouped").folder]
    said: list[str] = []
    found = bench(folders, SHORT, said.append)
    assert said == ["open", "warm up", "round 1 of 2", "round 2 of 2"]
    assert rates == [1, 1, 1]  # before, between and after the rounds
    assert {key: found[key] for key in ("kind", "threads", "rounds", "new_tokens", "prompt_tokens")} == {
        "kind": "generator", "threads": 1, "rounds": 2, "new_tokens": 4, "prompt_tokens": [3],
    }  # fmt: skip
    assert [artifact["folder"] for artifact in found["artifacts"]] == [str(folder) for folder in folders]
    for artifact in found["artifacts"]:
        [length] = artifact["lengths"]
        assert length["ttft_ms"]["median"] > 0
        assert length["tpot_ms"]["median"] > 0
        assert length["tokens_per_s"]["min"] <= length["tokens_per_s"]["median"] <= length["tokens_per_s"]["max"]
        assert length["step_ms"]["p50"] <= length["step_ms"]["p90"] <= length["step_ms"]["p99"]
        assert length["bandwidth_share"] == pytest.approx(
            artifact["weight_bytes_per_call"] * length["tokens_per_s"]["median"] / 1e10, rel=1e-6
        )
        assert 10**7 < artifact["peak_rss_bytes"] < 10**9
    assert found["artifacts"][0]["lengths"][0]["tokens_per_s_ratio"] == 1


def test_encoders_are_measured_by_the_call(tmp_path: Path, rates: list[int]) -> None:
    folders = [write_encoder(tmp_path / name).folder for name in ("one", "other")]
    found = bench(folders, SHORT)
    assert found["kind"] == "encoder"
    assert found["artifacts"][0]["weight_bytes_per_call"] == 64
    [length] = found["artifacts"][1]["lengths"]
    assert length["prompt_tokens"] == 3
    assert length["texts_per_s"]["median"] > 0
    assert length["call_ms"]["p50"] > 0
    assert "one text of 3 tokens a call" in bench_text(found)
    assert "× texts/s" in bench_text(found)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, rates: list[int]) -> None:
    [generator] = write_generators(tmp_path, Limits())
    encoder = write_encoder(tmp_path / "encoder").folder
    with pytest.raises(UsageError, match="no speed in common") as caught:
        bench([generator, encoder], SHORT)
    assert caught.value.where == (f"{generator}  generator", f"{encoder}  encoder")
    strange = write_encoder(tmp_path / "strange", extra="pixel_values").folder
    with pytest.raises(Unsupported, match="nobody knows here what to feed") as unknown:
        bench([strange], SHORT)
    assert unknown.value.where == ("pixel_values",)
    assert rates == []


def test_every_length_that_is_too_long_is_named(tmp_path: Path, rates: list[int]) -> None:
    folders = write_generators(tmp_path, Limits(max_length=6), Limits(max_length=20))
    with pytest.raises(Unsupported, match="longer than an artifact takes") as caught:
        bench(folders, Bench((3, 4, 18), new_tokens=4))
    assert caught.value.where == (
        f"{folders[0]}  4 tokens and 3 after them, max_length 6",
        f"{folders[0]}  18 tokens and 3 after them, max_length 6",
        f"{folders[1]}  18 tokens and 3 after them, max_length 20",
    )
    encoder = write_encoder(tmp_path / "encoder", Limits(max_length=8)).folder
    with pytest.raises(Unsupported) as alone:
        bench([encoder], Bench((8, 9)))
    assert alone.value.where == (f"{encoder}  9 tokens, max_length 8",)


def test_broken_folders_are_told_before_anything_is_measured(tmp_path: Path, rates: list[int]) -> None:
    whole, broken = write_generators(tmp_path, Limits(), Limits())
    (broken / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactUnreadable, match=r"generator-1.model\.onnx"):
        bench([whole, broken], SHORT)
    with pytest.raises(ArtifactUnreadable, match="2 of 3 folders cannot be measured") as caught:
        bench([whole, broken, tmp_path / "nothing"], SHORT)
    assert len(caught.value.where) == 2
    assert "nothing does not exist" in caught.value.where[1]
    assert rates == []


def test_a_process_that_is_killed_is_an_error_and_none_is_left(tmp_path: Path) -> None:
    [folder] = write_generators(tmp_path, Limits())
    with Worker(folder, 1) as worker:
        worker.answer()
        pid = worker._process.pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(CalqueError, match=r"generator-0 was killed by SIGKILL") as caught:
            worker.run([1, 2], 2)
        assert caught.value.exit_code == 1
    with Worker(folder, 1) as other:
        other.answer()
    for gone in (pid, other._process.pid):
        with pytest.raises(ProcessLookupError):
            os.kill(gone, 0)


def test_the_command_prints_tables_or_json(tmp_path: Path, rates: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(folder) for folder in write_generators(tmp_path, Limits(), Limits(max_length=6))]
    few = ["--prompt-tokens", "2", "3", "--new-tokens", "3", "--rounds", "1", "--threads", "1"]
    assert cli.main(["bench", *folders, *few]) == 0
    out, err = capsys.readouterr()
    assert out.count("× tokens/s") == 2
    assert "prompt of 2 tokens, 3 new" in out
    assert "1 round, 1 thread, memory read at 10.0 (10.0–10.0) GB/s" in out
    assert "round 1 of 1" in err
    assert cli.main(["bench", folders[0], *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == [2, 3]
    assert cli.main(["bench", *folders, "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["where"] == [
        f"{folders[1]}  128 tokens and 63 after them, max_length 6",
        f"{folders[1]}  512 tokens and 63 after them, max_length 6",
    ]
    assert cli.main(["bench", folders[0], "--new-tokens", "0"]) == 2


def figures(rates: tuple[float, ...] = (1e10, 1e10, 1e10)) -> dict[str, Any]:
    """Two rounds, the second of which was a slow minute for both; b is half as fast at tokens, and twice at the first."""
    runs = []
    for number, slow in enumerate((1, 3)):
        runs += [Run(0, number, 5, (0.4 * slow, 0.1 * slow, 0.1 * slow)), Run(1, number, 5, (0.2 * slow, 0.2 * slow, 0.2 * slow))]
    return results(SUBJECTS, runs, [1, 2], rates, {"threads": 0, "rounds": 2, "new_tokens": 3})


def test_figures_are_medians_and_ratios_those_within_rounds() -> None:
    first, second = (artifact["lengths"][0] for artifact in figures()["artifacts"])
    assert first["ttft_ms"] == pytest.approx({"median": 800, "min": 400, "max": 1200})
    assert first["tokens_per_s"]["median"] == pytest.approx((10 + 10 / 3) / 2)
    assert first["step_ms"] == pytest.approx({"p50": 100, "p90": 300, "p99": 300})
    assert first["bandwidth_share"] == pytest.approx((1 + 1 / 3) / 2)
    assert second["bandwidth_share"] is None
    assert (second["ttft_ratio"], second["tokens_per_s_ratio"]) == (pytest.approx(2), pytest.approx(0.5))


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles([float(value) for value in range(100, 0, -1)]) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([7.0]) == {"p50": 7, "p90": 7, "p99": 7}


def test_a_wide_range_and_an_impossible_share_are_noted() -> None:
    assert figures()["notes"] == []
    found = figures((1e10, 2e10, 1e9))
    assert "read at 1.0 to 20.0 GB/s" in found["notes"][0]
    impossible = figures((1e9, 1e9, 1e9))
    assert "above 100 %" in impossible["notes"][0]
    assert f"note: {found['notes'][0]}" in bench_text(found)


def test_one_new_token_has_no_rate(tmp_path: Path, rates: list[int]) -> None:
    found = bench(write_generators(tmp_path, Limits()), Bench((2,), new_tokens=1, rounds=1))
    [length] = found["artifacts"][0]["lengths"]
    assert length["tokens_per_s"] is None
    assert length["ttft_ms"]["median"] > 0
    assert "tokens/s" in bench_text(found)


def test_prompts_are_the_same_each_time_and_rounds_begin_with_another() -> None:
    assert prompt(128, 50) == prompt(128, 50)
    assert set(prompt(512, 50)) == set(range(50))
    assert [rotated(range(3), number) for number in (0, 1, 5)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


@pytest.mark.parametrize("threads", [0, 2])
def test_memory_is_read_at_a_rate_that_memory_has(threads: int) -> None:
    assert 1e8 < bandwidth(threads) < 1e13


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_is_left_when_the_command_is_ended(tmp_path: Path, how: signal.Signals, code: int) -> None:
    folders = [str(folder) for folder in write_generators(tmp_path, Limits(), Limits())]
    command = [sys.executable, "-m", "calque.cli", "bench", *folders, "--rounds", "1000", "--prompt-tokens", "4"]
    here = Path(__file__).parents[2]
    # A group of its own, all of which the signal goes to, as Ctrl-C in a terminal does.
    with subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "round 1" in line)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.killpg(process.pid, how)
        said = process.stderr.read()
    assert len(workers) == 2
    assert process.returncode == code
    assert "Traceback" not in said
    wait_until(lambda: not any(is_running(worker) for worker in workers))


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
