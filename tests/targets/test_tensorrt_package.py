"""What a TensorRT artifact carries beside its model, and how runs of its scripts are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from calque import ceiling, targets
from calque.errors import WontFit
from calque.targets._tensorrt_package import run_build, run_validation, write_package

ROOT = Path(__file__).parents[2]

BUILD = {
    "schema": 1, "onnx": "model.onnx", "engine": "model.plan", "network_flags": ["STRONGLY_TYPED"], "builder_flags": [],
    "memory_pool_limits": {}, "builder_optimization_level": 3, "profiling_verbosity": "DETAILED", "hardware_compatibility_level": "NONE",
    "compute_capabilities": [],
}  # fmt: skip


def entry(name: str, rows: int, columns: int) -> dict[str, Any]:
    shapes = {"input_ids": {"min": [1, 1], "opt": [1, columns], "max": [rows, columns]}, "kv": {"min": [1], "opt": [1], "max": [rows]}}
    return {"name": name, "shapes": shapes}


def test_equal_descriptions_give_equal_files(tmp_path: Path) -> None:
    profiles = {"schema": 1, "profiles": [entry("default", 8, 64)]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert write_package(tmp_path / name, BUILD, profiles) == sorted(path.name for path in (tmp_path / name).iterdir())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert json.loads((tmp_path / "a" / "build.json").read_text()) == BUILD
    assert (tmp_path / "a" / "profiles.json").read_text().endswith("}\n")
    for path in (ROOT / "targets" / "tensorrt_package").glob("*.py"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_scripts_are_no_target() -> None:
    assert [name for name in targets.built_in() if "package" in name] == []


def test_trtexec_is_told_the_same(tmp_path: Path) -> None:
    write_package(tmp_path, BUILD, {"schema": 1, "profiles": [entry("default", 8, 64)]})
    text = (tmp_path / "trtexec.txt").read_text().replace(" \\\n ", "")
    command = next(line for line in text.splitlines() if line.startswith("trtexec "))
    assert command.split()[1:] == [
        "--onnx=model.onnx", "--saveEngine=model.plan", "--minShapes=input_ids:1x1,kv:1", "--optShapes=input_ids:1x64,kv:1",
        "--maxShapes=input_ids:8x64,kv:8", "--builderOptimizationLevel=3", "--profilingVerbosity=detailed", "--stronglyTyped",
    ]  # fmt: skip


def test_trtexec_is_told_of_every_profile_and_flag(tmp_path: Path) -> None:
    build = BUILD | {
        "builder_flags": ["VERSION_COMPATIBLE", "STRICT_NANS"],
        "cleared_builder_flags": ["TF32"],
        "hardware_compatibility_level": "AMPERE_PLUS",
        "memory_pool_limits": {"WORKSPACE": 1 << 30},
    }
    write_package(tmp_path, build, {"schema": 1, "profiles": [entry("prefill", 8, 64), entry("decode", 8, 1)]})
    text = (tmp_path / "trtexec.txt").read_text()
    words = text.split()
    first, second = words.index("--profile=0"), words.index("--profile=1")
    assert words[first : second + 1 : 1].count("--maxShapes=input_ids:8x64,kv:8") == 1
    assert "--maxShapes=input_ids:8x1,kv:8" in words[second:]
    assert {"--versionCompatible", "--noTF32", "--hardwareCompatibilityLevel=ampere+", f"--memPoolSize=workspace:{1 << 30}B"} <= set(words)
    assert "# trtexec has no word for STRICT_NANS." in text


@pytest.mark.parametrize(
    ("script", "error", "code"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV", -11),
        ("raise SystemExit(9)", "build_engine.py ended with 9 and said nothing that can be read", 9),
        ("print([1])", "build_engine.py ended with 0 and said nothing that can be read", 0),
        ('print(\'{"error": "no"}\'); raise SystemExit(5)', "no", 5),
    ],
)
def test_a_crash_is_an_answer(tmp_path: Path, script: str, error: str, code: int) -> None:
    (tmp_path / "build_engine.py").write_text(script)
    said = run_build(tmp_path)
    assert (said["error"], said["exit_code"]) == (error, code)


def test_both_scripts_are_run_in_their_folder_with_what_is_asked(tmp_path: Path) -> None:
    for name in ("build_engine.py", "run_engine.py"):
        (tmp_path / name).write_text("import json, os, sys\nprint(json.dumps({'cwd': os.getcwd(), 'argv': sys.argv}))")
    said = run_build(tmp_path, "tensorrt_rtx", threads=2, engine=Path("a.plan"))
    assert said["cwd"] == str(tmp_path)
    assert said["argv"] == ["build_engine.py", "--sdk=tensorrt_rtx", "--threads=2", "--engine=a.plan", "--json"]
    assert run_validation(tmp_path)["argv"] == ["run_engine.py", "--json"]


SLEEPS = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"


def started(folder: Path) -> int:
    """The process of the folder's script, once it runs."""
    for _ in range(200):
        if (folder / "pid").is_file() and (text := (folder / "pid").read_text()):
            return int(text)
        time.sleep(0.05)
    pytest.fail("the script did not start")


def gone(pid: int) -> bool:
    """Whether a process has ended, a moment being given to it."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_builder_ends_with_the_process_that_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "build_engine.py").write_text(SLEEPS)
    waiting = "import sys; from pathlib import Path; from calque.targets._tensorrt_package import run_build; run_build(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", waiting, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    builder = started(tmp_path)
    process.kill()
    process.wait()
    assert gone(builder)


def test_a_builder_is_ended_where_waiting_for_it_is(tmp_path: Path) -> None:
    """As where memory passes its ceiling, which is raised in the thread that waits."""
    (tmp_path / "build_engine.py").write_text(SLEEPS)
    with pytest.raises(WontFit), ceiling.under(1, lambda: "build"):
        run_build(tmp_path)
    if (tmp_path / "pid").is_file():
        assert gone(int((tmp_path / "pid").read_text()))
