"""docs/support.md is what docs/support.json says, which leaves no type out and claims nothing that does not pass here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from calque import tasks
from calque.conformance import STATUSES, Record, Sweep, names_of, read, sweep
from tests.tiny_models import TYPES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "support.json"
TENSORRT = ROOT / "docs" / "targets" / "tensorrt-support.json"
CAUSAL = "text-generation-with-past"
FEWEST = 145
FEWEST_ENGINES = 127

# One type for each thing that is done for more than one: the whole sweep takes too long to run each time.
QUICK = ("bart", "falcon-alibi", "mamba")
SUBSET = [
    *QUICK,
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v2", "gemma4_unified", "gpt_neo", "llama4_text", "mpt")),
]


def support() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support", ROOT / "docs" / "support.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(task: str = CAUSAL) -> dict[str, Record]:
    return read(RESULTS)[task]


@pytest.mark.parametrize("target", sorted(support().OPENINGS))
def test_a_support_page_is_what_the_records_say(target: str) -> None:
    page = support()
    assert page.page_of(target).read_text(encoding="utf-8") == page.page(target, read(page.results_of(target))), "run docs/support.py"


def test_at_least_as_many_types_become_engines_as_ever() -> None:
    records = read(TENSORRT)[CAUSAL]
    assert sorted(records) == sorted(names_of(tasks.find(CAUSAL)))
    assert sum(record["status"] == "passed" and record["build"] == "passed" for record in records.values()) >= FEWEST_ENGINES
    assert [name for name, record in records.items() if (record["status"] == "passed") == bool(record.get("error", "").strip())] == []


@pytest.mark.parametrize("task", sorted(read(RESULTS)))
def test_the_records_name_every_type_of_transformers_and_no_other(task: str) -> None:
    assert sorted(recorded(task)) == sorted(names_of(tasks.find(task)))


@pytest.mark.parametrize("task", sorted(read(RESULTS)))
def test_a_type_that_does_not_pass_says_why(task: str) -> None:
    for name, record in recorded(task).items():
        assert record["status"] in STATUSES, name
        assert (record["status"] == "passed") != bool(record.get("error", "").strip()), name
        assert (record["status"] == "passed") <= (record.get("worst_sigma") is not None), name


def test_at_least_as_many_types_pass_as_ever() -> None:
    assert sum(record["status"] == "passed" for record in recorded().values()) >= FEWEST


def test_types_that_every_run_converts_are_recorded_as_passed() -> None:
    # tests/conformance/test_causal_lm_types.py fails where one of these does not pass.
    records = recorded()
    assert {name for name in TYPES if name in records and records[name]["status"] != "passed"} == set()


@pytest.mark.parametrize("name", SUBSET)
def test_what_is_recorded_is_what_happens(name: str, tmp_path: Path) -> None:
    made = sweep(Sweep(tasks.find(CAUSAL), types=(name,)), tmp_path / "results.json", lambda *_: None)[name]
    known = recorded()[name]
    assert (made["status"], made.get("limits"), made["features"]) == (known["status"], known.get("limits"), known["features"])
    assert made.get("error") == known.get("error")
