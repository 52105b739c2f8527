"""Conversions that are killed, interrupted or watched, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calque.errors import UsageError
from calque.staging import staging
from tests.calque.artifact_folder import content, names, write_artifact

CONVERSION = textwrap.dedent("""
    import sys, time, json
    from pathlib import Path
    from calque import staging as s
    out, moment = Path(sys.argv[1]), sys.argv[2]
    def wait():
        print("ready", flush=True)
        time.sleep(60)
    if moment == "before publishing":
        s._publish = lambda *a, **k: wait()
    if moment == "between the renames":
        s._exchange = lambda first, second: False
        rename, calls = Path.rename, []
        def slow(path, target):
            calls.append(path)
            if len(calls) == 2:
                wait()
            return rename(path, target)
        Path.rename = slow
    if moment == "after publishing":
        s.shutil.rmtree = lambda *a, **k: wait()
    with s.staging(out, force=True) as folder:
        if moment == "at the start":
            wait()
        (folder / "model.onnx").write_text("new")
        if moment == "half written":
            wait()
        (folder / "manifest.json").write_text(json.dumps({"schema": 1, "target": "t", "recipe": {}, "files": {"model.onnx": ""}}))
""")
MOMENTS = ["at the start", "half written", "before publishing", "between the renames", "after publishing"]

Start = Callable[[Path, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    script = tmp_path / "conversion.py"
    script.write_text(CONVERSION)
    running: list[subprocess.Popen[str]] = []

    def start_one(out: Path, moment: str) -> subprocess.Popen[str]:
        root = Path(__file__).parents[2]
        process = subprocess.Popen(
            [sys.executable, str(script), str(out), moment], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill_never_leaves_a_half_artifact(tmp_path: Path, start: Start, moment: str) -> None:
    folder = tmp_path / "output"
    out = folder / "out"
    write_artifact(out, "old")
    process = start(out, moment)
    process.kill()
    process.wait()
    if moment == "between the renames":
        assert not out.exists()
    else:
        assert content(out) == ("new" if moment == "after publishing" else "old")
        assert "manifest.json" in names(out)
    with staging(out, force=True) as fresh:
        assert content(out) == ("new" if moment == "after publishing" else "old")
        write_artifact(fresh, "newer")
    assert content(out) == "newer"
    assert names(folder) == ["out"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["at the start", "half written", "before publishing", "between the renames"])
def test_an_interrupt_or_a_termination_cleans_up(tmp_path: Path, start: Start, moment: str, sent: signal.Signals) -> None:
    folder = tmp_path / "output"
    out = folder / "out"
    write_artifact(out, "old")
    process = start(out, moment)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert content(out) == "old"
    assert names(folder) == ["out"]


def test_a_live_conversion_in_another_process_is_respected(tmp_path: Path, start: Start) -> None:
    out = tmp_path / "output" / "out"
    process = start(out, "half written")
    before = names(out.parent)
    with pytest.raises(UsageError, match="another conversion"), staging(out):
        pytest.fail("the block must not run")
    assert names(out.parent) == before
    process.kill()


def test_readers_never_see_a_half_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(out, "0")
    reader = textwrap.dedent("""
        import sys, os
        from pathlib import Path
        out, seen = Path(sys.argv[1]), set()
        print("ready", flush=True)
        while not (out.parent / "stop").exists():
            descriptor = os.open(out, os.O_RDONLY)  # raises where `out` is absent for an instant
            seen.add(tuple(sorted(os.listdir(descriptor))))
            os.close(descriptor)
        print(seen)
    """)
    process = subprocess.Popen([sys.executable, "-c", reader, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    for attempt in range(60):
        with staging(out, force=True) as folder:
            write_artifact(folder, str(attempt))
    time.sleep(0.05)
    (tmp_path / "stop").touch()
    seen, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    # A listing begun just before an exchange may see the older folder being emptied, never anything absent or foreign.
    assert "model.onnx" in seen
    assert "calque" not in seen
