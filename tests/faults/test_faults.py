"""Every fault of tests/faults/cases.py; the slow ones are `-m slow`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import CASES, NEEDS_DISK, Case, run_case
from tests.faults.workshop import ROOT, Job, Workshop, arguments_for, names
from tests.tiny_models import TYPES, save_random


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        # Models of the hub are put here by the cases that want one; each takes it away again with its folder.
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub") / "cache"))
        with Workshop() as started:
            yield started


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(TYPES["llama"], tmp_path_factory.mktemp("pristine"))


CHOSEN = [pytest.param(case, id=case.name, marks=() if case.quick else pytest.mark.slow) for case in CASES.values()]


@pytest.mark.parametrize("case", CHOSEN)
def test_fault_ends_in_one_clear_error_and_nothing_half_written(case: Case, workshop: Workshop, pristine: Path, tmp_path: Path) -> None:
    result = run_case(workshop, case, pristine, tmp_path)
    if result is None:
        pytest.skip(NEEDS_DISK)
    assert list(result.faults) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("after", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("stage", ["source", "trace", "lower", "reference"])
def test_interrupt_within_a_stage_leaves_nothing(
    fault: str, after: float, stage: str, workshop: Workshop, pristine: Path, tmp_path: Path
) -> None:
    result = run_case(workshop, Case("", fault, stage, after, codes=(0, 130), says=r"\A(interrupted)?\Z"), pristine, tmp_path)
    assert result is not None
    assert list(result.faults) == []


def test_second_conversion_into_the_same_folder_is_refused_and_the_first_ends_well(
    workshop: Workshop, pristine: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "outputs" / "out", tmp_path / "said"
    said.mkdir()
    first = workshop.begin(Job(arguments_for(pristine, out), out, pristine, "pause", "prove"), said)
    while not (out.parent / "paused").exists():
        time.sleep(0.05)
    second = workshop.run(Job(arguments_for(pristine, out), out, pristine))
    assert (second.code, second.stages) == (2, ())
    assert "another conversion is writing" in second.first_line
    (out.parent / "go").touch()
    assert workshop.end(first, said).code == 0
    assert names(out.parent) == ["go", "out", "paused"]


# Ctrl-C before the command has begun: while Python imports it. What Python itself shows before that is not ours to change.
@pytest.mark.parametrize("module", ["calque.arguments", "calque.commands", "calque.staging"])
def test_interrupt_while_the_command_is_imported_shows_no_traceback(module: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from calque.cli import main
sys.exit(main(["convert", "--target", "onnxruntime", "builtin:quill", "-o", {str(tmp_path / "out")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    assert names(tmp_path) == []


def test_interrupt_while_the_process_leaves_shows_no_traceback() -> None:
    # Registered before ours, as torch's are not; run after it.
    code = """
import atexit, os, signal, sys
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
from calque.cli import main
sys.exit(main(["--version"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
    assert result.stdout.startswith("calque ")


def test_interrupt_that_a_library_swallows_still_ends_the_conversion(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from calque import cli, pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)
resolve = pipeline.resolve
def swallowing(*arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
    return resolve(*arguments)
pipeline.resolve = swallowing
sys.exit(cli.main(["convert", "--target", "onnxruntime", "builtin:quill", "-o", {str(tmp_path / "out")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130, "interrupted")
    assert "trace" not in result.stderr
    assert names(tmp_path) == []


def test_interrupt_that_breaks_a_library_is_reported_as_an_interrupt(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from calque import cli, pipeline
signal.signal(signal.SIGINT, signal.default_int_handler)
def breaking(*arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        raise RecursionError("half imported")
pipeline.resolve = breaking
sys.exit(cli.main(["convert", "--target", "onnxruntime", "builtin:quill", "-o", {str(tmp_path / "out")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130, "interrupted")
    assert names(tmp_path) == []
