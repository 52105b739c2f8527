"""`calque convert` with a matrix or several recipes: the table, the exit code, the JSON, plans, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import calque
from calque import cli, recipe_names
from calque.errors import UsageError
from calque.recipe import Recipe
from tests.tiny_models import TINY, save_random

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here

Output = pytest.CaptureFixture[str]

ROOT = Path(calque.__file__).parents[1]
SETTINGS = "target: onnxruntime\nparity: {scenarios: [single-prompt, ragged-left]}\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and a recipe for it that one cell cannot follow."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    save_random(TINY["llama"], tmp_path / "tiny")
    (tmp_path / "matrix.yaml").write_text(f"model: ./tiny\n{SETTINGS}matrix: {{precision: [fp8, fp32]}}\n")
    return tmp_path


def test_every_cell_is_converted_and_told_in_a_table(place: Path, capsys: Output) -> None:
    command = ["convert", "--recipe", "matrix.yaml", "-o", "out"]
    assert cli.main(command) == 4
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["tiny-onnxruntime-fp8", "failed", "4"], ["tiny-onnxruntime-fp32", "passed", "0"]]
    assert "1 of 2: tiny-onnxruntime-fp8\nUnsupported: " in err
    assert (place / "out" / "tiny-onnxruntime-fp32" / "model.onnx").is_file()
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err

    assert cli.main([*command, "--resume", "--json"]) == 4
    facts = json.loads(capsys.readouterr().out)
    assert (facts["folder"], facts["exit_code"]) == ("out", 4)
    assert [cell["status"] for cell in facts["cells"]] == ["failed", "skipped"]
    assert facts["cells"] == json.loads((place / "out" / "matrix.json").read_text())["cells"]
    assert cli.main([*command, "--resume", "--precision", "fp32"]) == 2, "a flag that ends the matrix leaves one recipe, whose folder is -o"
    assert cli.main(["report", "out"]) == 0


def test_a_plan_of_a_matrix_plans_every_cell_and_writes_nothing(place: Path, capsys: Output) -> None:
    before = sorted(place.rglob("*"))
    assert cli.main(["convert", "--recipe", "matrix.yaml", "-o", "out", "--plan"]) == 4
    out, err = capsys.readouterr()
    assert "tiny-onnxruntime-fp32\nmodel" in out
    assert [line.split() for line in out.splitlines()[-2:]] == [["tiny-onnxruntime-fp8", "4"], ["tiny-onnxruntime-fp32", "0"]]
    assert "Unsupported" in err
    assert cli.main(["convert", "--recipe", "matrix.yaml", "--plan", "--json"]) == 4
    failed, planned = json.loads(capsys.readouterr().out)["cells"]
    assert (failed["error"]["type"], failed["plan"]) == ("Unsupported", None)
    assert (planned["plan"]["precision"], planned["exit_code"], planned["error"]) == ("fp32", 0, None)
    assert sorted(place.rglob("*")) == before


def test_several_recipes_are_one_run(place: Path, capsys: Output) -> None:
    (place / "plain.yaml").write_text(f"model: ./tiny\n{SETTINGS}")
    (place / "quill.yaml").write_text(f"model: builtin:quill\n{SETTINGS}precision: fp8\n")
    assert cli.main(["convert", "--recipe", "plain.yaml", "quill.yaml", "-o", "out"]) == 4
    assert [cell["status"] for cell in json.loads((place / "out" / "matrix.json").read_text())["cells"]] == ["passed", "failed"]
    capsys.readouterr()
    assert cli.main(["convert", "--recipe", "plain.yaml", "--recipe", "matrix.yaml", "-o", "out"]) == 2
    assert "several recipes would be written to one folder\n  tiny-onnxruntime-fp32\nFix: " in capsys.readouterr().err


def test_faults_of_all_recipes_come_at_once_before_any_work(place: Path, capsys: Output) -> None:
    (place / "a.yaml").write_text(f"model: ./tiny\n{SETTINGS}modle: x\n")
    (place / "b.yaml").write_text("- x")
    assert cli.main(["convert", "--recipe", "matrix.yaml", "a.yaml", "b.yaml", "-o", "out"]) == 2
    err = capsys.readouterr().err
    assert "2 recipes cannot be followed\n  1 problem in a.yaml: line 4: modle" in err
    assert "1 problem in b.yaml: line 1: a recipe is a mapping" in err
    assert not (place / "out").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_all_cells_and_what_is_done_stays(tmp_path: Path, sent: signal.Signals) -> None:
    (tmp_path / "matrix.yaml").write_text("target: onnxruntime\nmatrix: {model: [a/done, a/begun, a/waiting]}\n")
    code = """
        import sys, time
        from calque import pipeline
        from calque.staging import staging
        from tests.report_folder import write_report
        def convert(recipe, out, *, force, progress):
            if recipe.model == "a/done":
                return write_report(out)
            with staging(out, force) as folder:
                (folder / "half").touch()
                print("ready", flush=True)
                time.sleep(60)
        pipeline.convert = convert
        from calque.cli import main
        sys.exit(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), "convert", "--recipe", "matrix.yaml", "-o", "out"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["done-onnxruntime-fp32"]
    assert err.endswith("1 of 3 conversions had ended; --resume goes on from there\ninterrupted\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["done-onnxruntime-fp32", "matrix.json"]
    assert [cell["status"] for cell in json.loads((tmp_path / "out" / "matrix.json").read_text())["cells"]] == ["passed"]


def test_options_are_those_of_the_cells_and_not_of_the_default_precision() -> None:
    matrix = {"model": "builtin:quill", "matrix": {"target": ["coreml"], "precision": ["fp16", "int8"]}, "options": {"cache": "stateful"}}
    cells = Recipe.of(matrix, names=recipe_names.problems).expand()
    assert [cell.options for cell in cells.values()] == [{"cache": "stateful"}] * 2
    with pytest.raises(UsageError, match="float16"):
        Recipe.of({"model": "builtin:quill", "target": "coreml", "options": {"cache": "stateful", "a.b": 1}}, names=recipe_names.problems)
