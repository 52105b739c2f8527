"""The measuring measures: a tree of processes, the division of Calque's run, medians and ratios."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from benchmarks.conversion.measure import Measured, Sample, measure
from benchmarks.conversion.records import Cost, Record, divide, record
from benchmarks.conversion.run import is_there, parse, shown_command
from benchmarks.conversion.shapes import SHAPES
from benchmarks.conversion.tables import ALONE, PROOF, WHOLE, failures, figures, ratios, rows
from benchmarks.conversion.tools import Tool

MB = 10**6
# Holds 100 MB itself and twice 100 MB in children, together for 0.4 s; then says a word, works for 0.3 s of CPU and fails.
FAMILY = """
import subprocess, sys, time
hold = "import time; held = bytearray(100_000_000); time.sleep(0.8)"
children = [subprocess.Popen([sys.executable, "-c", hold]) for _ in range(2)]
held = bytearray(100_000_000)
for child in children:
    child.wait()
print("now the proof", flush=True)
while time.process_time() < 0.3:
    pass
sys.exit(3)
"""
# Holds 100 MB, and forks a copy that starts no program of its own.
FORK = """
import os, time
held = bytearray(100_000_000)
if os.fork() == 0:
    time.sleep(0.3)
else:
    os.wait()
"""
STAGES = [
    {"name": "trace", "seconds": 2.0, "peak_rss_bytes": 500},
    {"name": "reference", "seconds": 1.0, "peak_rss_bytes": 900},
    {"name": "prove", "seconds": 3.0, "peak_rss_bytes": 800},
]


def test_a_tree_is_measured_as_one(tmp_path: Path) -> None:
    """Memory is summed over the tree, processor time includes the children, and the mark is seen when it is said."""
    measured = measure([sys.executable, "-c", FAMILY], tmp_path / "log", os.environ, tmp_path, mark="the proof")
    assert measured.exit_code == 3
    assert 300 * MB < measured.peak_rss_bytes < 400 * MB
    assert measured.wall_s > 1
    assert 0.3 <= measured.cpu_s < measured.wall_s + 1
    assert measured.marked_at is not None
    assert 0.7 < measured.marked_at < measured.wall_s
    assert measured.samples[-1].cpu == pytest.approx(measured.cpu_s, abs=0.1)


def test_a_copy_of_the_parent_is_not_counted_again(tmp_path: Path) -> None:
    """Every program that starts another is such a copy for a moment."""
    measured = measure([sys.executable, "-c", FORK], tmp_path / "log", os.environ, tmp_path)
    assert 100 * MB < measured.peak_rss_bytes < 150 * MB


def test_the_conversion_alone_is_all_but_the_proof() -> None:
    """The proof's stages, its processor time and the reference are taken off the whole."""
    samples = tuple(Sample(at, 0, 2 * at) for at in range(11))
    measured = Measured(0, 10.0, 20.0, 1000, 0.0, 4.0, samples)
    alone, proof = divide(measured, STAGES, whole_bytes=70, proof_bytes=20)
    assert proof == Cost(4.0, 8.0, 900, 20)
    assert alone == Cost(6.0, 12.0, 500, 50)


def test_without_the_mark_processor_time_is_not_divided() -> None:
    """An output that no longer says when the proof begins gives no figure, not a wrong one."""
    alone, proof = divide(Measured(0, 10.0, 20.0, 1000, 0.0, None, ()), STAGES, 70, 20)
    assert (alone.cpu_s, proof.cpu_s) == (None, None)


def test_medians_are_of_the_runs_that_succeeded() -> None:
    """A failed run shows in the exit codes alone; ratios are the peer divided by Calque."""
    peer = [Record("peer", exit_code, Cost(wall, wall, 4 * MB, MB), 0.0) for exit_code, wall in ((0, 4.0), (1, 90.0), (0, 8.0))]
    own = Record("Calque", 0, Cost(3.0, 3.0, 2 * MB, MB), 0.0, Cost(2.0, None, MB, MB), Cost(1.0, None, 2 * MB, 0))
    found = rows([own, *peer])
    assert [row.name for row in found] == [WHOLE, ALONE, PROOF, "peer"]
    assert "| peer | 6.0 | 6.0 | 4 | 1.0 | 0 1 0 |" in figures(found)
    assert "| peer ÷ conversion and proof | 2.00 | 2.00 | 2.00 | 1.00 |" in ratios(found)
    assert "| peer ÷ conversion alone | 3.00 | – | 4.00 | 1.00 |" in ratios(found)


def test_the_shape_is_that_of_smollm2_135m() -> None:
    """The number of parameters is that of the published checkpoint."""
    parameters = sum(dims[0] * (dims[1] if len(dims) > 1 else 1) for dims in SHAPES["S"].tensors().values())
    assert parameters == 134_515_008
    assert json.loads(json.dumps(SHAPES["S"].config())) == SHAPES["S"].config()


def test_the_shape_is_that_of_llama_3_2_1b() -> None:
    """The number of parameters is that of the published checkpoint, and its rotary frequencies are scaled."""
    assert sum(math.prod(dims) for dims in SHAPES["L"].tensors().values()) == 1_235_814_400
    assert SHAPES["L"].config()["rope_scaling"]["rope_type"] == "llama3"
    assert SHAPES["S"].config()["rope_scaling"] is None


def test_a_tool_that_fails_is_a_result(tmp_path: Path) -> None:
    """Its last words are kept, without the folders of the machine."""
    says = "import sys; print('first'); sys.exit('no room in ' + sys.argv[1])"
    log = tmp_path / "log"
    measured = measure([sys.executable, "-c", says, str(tmp_path / "out")], log, os.environ, tmp_path)
    found = record("peer", measured, tmp_path / "out", log, {tmp_path: "WORK"})
    assert found.message == "no room in WORK/out"
    assert failures([found, found]) == "- peer ended with exit code 1: `no room in WORK/out`"
    assert "| peer | – | – | – | – | 1 |" in figures(rows([found]))


def test_a_command_has_its_folders_filled_in() -> None:
    """Where one stands alone, and where it begins the path of a file."""
    tool = Tool("peer", Path("python"), "", ("convert", "MODEL", "--out", "OUT/model.gguf", "--MODEL"))
    assert tool.command(Path("m"), Path("o"), Path("c")) == ["python", "convert", "m", "--out", "o/model.gguf", "--MODEL"]


def test_what_is_measured_is_left_out_when_resuming(tmp_path: Path) -> None:
    """Only then, and by shape."""
    (tmp_path / "results-S.md").touch()
    shapes = ["--shapes", "S", "M", "--results", str(tmp_path)]
    resumed, anew = parse([*shapes, "--resume"]), parse(shapes)
    assert [is_there(resumed, name) for name in ("S", "M", "S-int4")] == [True, False, False]
    assert not is_there(anew, "S")


def test_the_command_names_no_folder() -> None:
    """What is published names no path of the machine."""
    args = parse(["--shapes", "S", "XS", "--repeat", "5", "--work", "/somewhere", "--results", "/elsewhere"])
    assert shown_command(args, "XS") == "python -m benchmarks.conversion.run --shapes XS --repeat 5"
