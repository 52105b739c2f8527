"""The sweep goes on where it stopped, survives what a type does to it, and leaves nothing out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calque import conformance, isolation, shrink, tasks
from calque.cli import main
from calque.conformance import Record, Sweep, merged, names_of, read, sweep, write
from calque.errors import UsageError
from tests.endings import convert_but_crash_on_bert

CAUSAL = tasks.find("text-generation-with-past")


def nothing(_: str, __: Record) -> None:
    """Hear of no progress."""


def forbidden(*_: Any) -> isolation.Outcome:
    pytest.fail("something was run again")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_hold_every_type_once(count: int) -> None:
    shards = [Sweep(CAUSAL, shard=(index, count)).names() for index in range(1, count + 1)]
    together = [name for shard in shards for name in shard]
    assert len(together) == len(set(together))
    assert set(together) == set(names_of(CAUSAL))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_types_of_a_task_are_transformers_own_and_the_variants() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) < set(names_of(CAUSAL))
    assert "falcon-alibi" in names_of(CAUSAL)
    assert names_of(tasks.find("fill-mask")) == sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def test_names_that_are_no_type_and_shards_that_are_not_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"lama; did you mean `llama`"):
        Sweep(CAUSAL, types=("lama",)).names()
    with pytest.raises(UsageError, match="no shard 5 of 4"):
        Sweep(CAUSAL, shard=(5, 4)).names()


def test_crash_of_one_type_is_its_own_and_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.json"
    asked = Sweep(CAUSAL, types=("bert", "gpt2", "mamba"))
    heard: list[str] = []
    monkeypatch.setattr(conformance, "main", convert_but_crash_on_bert)
    records = sweep(asked, results, lambda name, _: heard.append(name))
    assert heard == ["bert", "gpt2", "mamba"]
    assert [records[name]["status"] for name in heard] == ["error", "passed", "unsupported"]
    assert records["bert"]["error"].startswith("killed by SIGKILL")
    assert records["gpt2"]["worst_sigma"] < 3e-5
    assert records["gpt2"]["scenarios"] == {"passed": 14}
    assert records["gpt2"]["limits"] == {"batched_chunk": False, "max_length": 128}
    assert "recurrent state" in records["mamba"]["error"]
    assert str(tmp_path) not in results.read_text()
    assert read(results)[CAUSAL.name] == records

    monkeypatch.setattr(isolation, "call", forbidden)
    assert sweep(asked, results, nothing) == records
    monkeypatch.setattr(isolation, "call", lambda *_: isolation.Outcome(4, '{"error": {"what": "no", "where": []}}', ""))
    again = sweep(replace(asked, again=frozenset({"error"})), results, nothing)
    assert again["bert"]["error"] == "no"
    assert again["gpt2"] == records["gpt2"]
    monkeypatch.setattr(conformance, "code_digest", lambda: "another")
    assert {record["error"] for record in sweep(asked, results, nothing).values()} == {"no"}


@pytest.mark.parametrize(
    ("outcome", "status", "text"),
    [
        (isolation.Outcome(None, "", ""), "error", "did not end within 10 minutes"),
        (isolation.Outcome(-9, "", "loading\nrunning"), "error", "killed by SIGKILL\nloading\nrunning"),
        (isolation.Outcome(1, '{"error": {"what": "broken", "where": ["here"]}}', ""), "error", "broken\nhere"),
        (isolation.Outcome(4, '{"error": {"what": "refused", "where": []}}', ""), "unsupported", "refused"),
        (isolation.Outcome(3, "no json", "last words"), "failed", "last words"),
    ],
)
def test_every_ending_becomes_a_record_with_its_text(
    outcome: isolation.Outcome, status: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "call", lambda *_: outcome)
    record = sweep(Sweep(CAUSAL, types=("llama",)), tmp_path / "results.json", nothing)["llama"]
    assert (record["status"], record["exit_code"], record["error"]) == (status, outcome.code, text)


def test_type_whose_config_cannot_be_made_is_an_error_with_upstreams_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, causal: bool) -> Any:
        raise ValueError(f"{name} has no such size")

    monkeypatch.setattr(shrink, "shrunken", refuse)
    monkeypatch.setattr(isolation, "call", forbidden)
    results = tmp_path / "results.json"
    record = sweep(Sweep(CAUSAL, types=("llama",)), results, nothing)["llama"]
    assert record["status"] == "error"
    assert record["error"] == "no small config: ValueError: llama has no such size"
    assert sweep(Sweep(CAUSAL, types=("llama",)), results, nothing)["llama"] == record


def record(status: str) -> Record:
    return {"status": status, "fingerprint": "", "tools": {}}


def test_shards_are_put_together_and_the_later_file_wins(tmp_path: Path) -> None:
    write(tmp_path / "1.json", {"a": {"x": record("failed"), "y": record("passed")}})
    write(tmp_path / "2.json", {"a": {"x": record("passed")}, "b": {"z": record("error")}})
    together = merged([tmp_path / "1.json", tmp_path / "2.json"])
    assert together == {"a": {"x": record("passed"), "y": record("passed")}, "b": {"z": record("error")}}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 99, "tasks": {}}'])
def test_file_that_no_sweep_wrote_is_an_error_and_stays(text: str, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(text)
    with pytest.raises(UsageError, match=r"results\.json"):
        sweep(Sweep(CAUSAL, types=("llama",)), results, nothing)
    assert results.read_text() == text


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        ([("passed", 0), ("unsupported", 4), ("error", 7)], 0),
        ([("passed", 0), ("error", 1)], 1),
        ([("error", None), ("unsupported", 4)], 1),
        ([("error", -9), ("failed", 3)], 3),
        ([], 0),
    ],
)
def test_exit_code_is_that_of_what_went_wrong_here(endings: list[tuple[str, int | None]], code: int) -> None:
    assert conformance.exit_code({str(i): {"status": status, "exit_code": ended} for i, (status, ended) in enumerate(endings)}) == code


def test_command_prints_counts_and_ends_with_3_where_a_type_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endings: dict[str, Callable[[], isolation.Outcome]] = {
        "llama": lambda: isolation.Outcome(4, '{"error": {"what": "refused", "where": []}}', ""),
        "gpt2": lambda: isolation.Outcome(3, '{"error": {"what": "wrong", "where": []}}', ""),
    }
    monkeypatch.setattr(isolation, "call", lambda _, arguments, __: endings[Path(arguments[1]).parent.name]())
    results = ["--results", str(tmp_path / "results.json")]
    assert main(["conformance", "--types", "llama", *results]) == 0
    assert capsys.readouterr().out == "text-generation-with-past: 1 types, 0 passed, 0 failed, 1 unsupported, 0 error\n"
    assert main(["conformance", "--types", "llama,gpt2", "--json", *results]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert (printed["types"], printed["failed"], printed["unsupported"]) == (2, 1, 1)
    assert printed["records"]["gpt2"]["error"] == "wrong"
