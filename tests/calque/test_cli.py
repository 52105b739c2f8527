"""The command line: what it accepts, what it prints, and the exit code of every failure. Conversion itself is stubbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import calque
from calque import cli, errors, pipeline
from calque.artifact import Artifact
from calque.recipe import Recipe
from tests.calque.artifact_folder import PASSED, REPORT, write_proved_artifact

CONVERT = ["convert", "--target", "onnxruntime", "builtin:quill"]

Output = pytest.CaptureFixture[str]


class Converted:
    """A stand-in for pipeline.convert: remembers what it was asked, writes an artifact, or raises."""

    def __init__(self) -> None:
        self.recipe: Recipe | None = None
        self.force = False
        self.error: BaseException | None = None
        self.proof = PASSED

    def __call__(self, recipe: Recipe, out: Path, *, force: bool, progress: Callable[[str], None]) -> Artifact:
        self.recipe, self.force = recipe, force
        progress("trace")
        if isinstance(self.error, errors.ParityFailed):
            write_proved_artifact(out.with_name(out.name + ".rejected"))
        if self.error is not None:
            raise self.error
        return write_proved_artifact(out, self.proof)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Converted:
    monkeypatch.chdir(tmp_path)
    stand_in = Converted()
    monkeypatch.setattr(pipeline, "convert", stand_in)
    return stand_in


def test_convert_prints_the_tables_and_where_it_wrote(converted: Converted, capsys: Output) -> None:
    assert cli.main(CONVERT) == 0
    out, err = capsys.readouterr()
    assert "worst |Δ|/σ" in out
    assert "single       1         40      1.2e-05     2.0e-06  1.0e-04  1.0000          0     0.50  passed" in out
    assert "trace      3.2       512 MB" in out
    assert "numerics   passed by onnxruntime, worst ≤ 2e-05 σ" in out
    assert "wrote quill-onnxruntime-fp32" in out
    assert err == "[   0.0s] trace …\n"
    assert not converted.force


def test_every_flag_reaches_the_recipe(converted: Converted, tmp_path: Path) -> None:
    flags = ["--task", "text-generation-with-past", "--precision", "int4", "--logits", "last", "--calibration", "c.txt"]
    flags += [
        "--set",
        "operators=standard",
        "--scenarios",
        "batch-2,length-1",
        "--text",
        "heldout.txt",
        "--max-kl",
        "1e-2",
        "--max-size",
        "5MB",
        "--sensitivity",
        "--require",
        "build",
        "--max-memory",
        "2GB",
        "--threads",
        "3",
        "--random-weights",
    ]
    flags += ["--trust-remote-code", "--force", "-o", "there"]
    assert cli.main([*CONVERT, *flags]) == 0
    assert converted.force
    assert (tmp_path / "there" / "manifest.json").is_file()
    assert converted.recipe == Recipe.of(
        {
            "model": "builtin:quill", "target": "onnxruntime", "task": "text-generation-with-past", "precision": "int4", "logits": "last",
            "calibration": {"text": "c.txt"}, "options": {"operators": "standard"},
            "parity": {
                "scenarios": ["batch-2", "length-1"], "text": "heldout.txt", "max_kl": 0.01, "max_size": 5 * 10**6, "sensitivity": True,
            },
            "require": "build",
            "max_memory": 2 * 10**9, "threads": 3, "random_weights": True, "trust_remote_code": True,
        }
    )  # fmt: skip


@pytest.mark.parametrize("nats", ["-1", "nan", "inf", "few"])
def test_a_divergence_that_none_can_have_is_bad_usage(converted: Converted, nats: str, capsys: Output) -> None:
    assert cli.main([*CONVERT, "--max-kl", nats]) == 2
    assert "is not a number of nats" in capsys.readouterr().err
    assert converted.recipe is None


def test_limits_of_quality_join_those_of_the_recipe(converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: builtin:quill\ntarget: onnxruntime\nparity: {text: a.txt, max_kl: 0.5, max_size: 1GB}\n")
    assert cli.main(["convert", "--recipe", str(tmp_path / "r.yaml"), "--max-kl", "0"]) == 0
    assert converted.recipe is not None
    parity = converted.recipe.parity
    assert (parity.text, parity.max_kl, parity.max_size, parity.sensitivity) == ("a.txt", 0.0, 10**9, False)


@pytest.mark.parametrize("how", ["-m", "--model"])
def test_the_model_may_be_a_flag(converted: Converted, how: str) -> None:
    assert cli.main(["convert", how, "org/name", "--target", "onnxruntime"]) == 0
    assert converted.recipe is not None
    assert converted.recipe.model == "org/name"


def test_flags_win_over_the_recipe_file(converted: Converted, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("{model: builtin:quill, target: onnxruntime, logits: last, random_weights: true, threads: 2}")
    assert cli.main(["convert", "--recipe", "r.yaml", "--logits", "dynamic"]) == 0
    assert converted.recipe is not None
    assert (converted.recipe.logits, converted.recipe.random_weights, converted.recipe.threads) == ("dynamic", True, 2)


@pytest.mark.usefixtures("converted")
def test_json_is_all_there_is_on_stdout(capsys: Output) -> None:
    assert cli.main([*CONVERT, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["artifact"] == "quill-onnxruntime-fp32"
    assert result["proof"]["numerics"]["status"] == "passed"
    assert result["report"] == REPORT
    assert "trace" in err


def test_convert_is_calque_convert(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *CONVERT[1:]])
    assert cli.convert_main() == 0
    assert converted.recipe is not None


EVERY_ERROR = [
    (errors.CalqueError("x"), 1), (errors.UsageError("x"), 2), (errors.RecipeError("x"), 2), (errors.ParityFailed("x"), 3),
    (errors.Unsupported("x"), 4), (errors.TargetUnavailable("x"), 5), (errors.WontFit("x"), 6), (errors.SourceUnreadable("x"), 7),
    (errors.WeightMismatch("x"), 7), (errors.ArtifactUnreadable("x"), 7), (MemoryError(), 6), (RuntimeError("x"), 1),
    (KeyboardInterrupt(), 130), (ModuleNotFoundError("no torch", name="torch"), 5), (ModuleNotFoundError("x", name="xyz"), 1),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code"), EVERY_ERROR, ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "")
def test_every_failure_has_its_exit_code(converted: Converted, capsys: Output, error: BaseException, code: int) -> None:
    converted.error = error
    assert cli.main(CONVERT) == code
    assert capsys.readouterr().err.strip()


def test_the_documented_exit_codes_are_those_of_the_errors() -> None:
    from calque.arguments import EXIT_CODES

    def all_kinds(kind: type[errors.CalqueError]) -> set[int]:
        return {kind.exit_code}.union(*(all_kinds(child) for child in kind.__subclasses__()))

    assert set(EXIT_CODES) == {0, errors.INTERRUPTED} | all_kinds(errors.CalqueError)


def test_an_error_says_what_where_and_what_to_do(converted: Converted, capsys: Output) -> None:
    converted.error = errors.Unsupported("no such operator", ["node_1", "node_2"], "upgrade")
    assert cli.main([*CONVERT, "--json"]) == 4
    out, err = capsys.readouterr()
    assert err.endswith("Unsupported: no such operator\n  node_1\n  node_2\nFix: upgrade\n")
    expected = {"type": "Unsupported", "exit_code": 4, "what": "no such operator", "where": ["node_1", "node_2"], "fix": "upgrade"}
    assert json.loads(out) == {"error": expected}


def test_an_unexpected_error_is_one_line_unless_verbose(converted: Converted, capsys: Output) -> None:
    converted.error = RuntimeError("first\nsecond")
    assert cli.main(CONVERT) == 1
    line = "internal error: RuntimeError: first second (run with -v for the traceback)\n"
    assert capsys.readouterr().err == "[   0.0s] trace …\n" + line
    assert cli.main([*CONVERT, "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.main([*CONVERT, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 1


def test_a_failed_proof_shows_the_table_and_the_rejected_folder(converted: Converted, tmp_path: Path, capsys: Output) -> None:
    converted.error = errors.ParityFailed("numerics failed", ["single: diverges in layer 3"])
    assert cli.main(CONVERT) == 3
    out, err = capsys.readouterr()
    assert "worst |Δ|/σ" in out
    assert f"rejected folder: {tmp_path / 'quill-onnxruntime-fp32.rejected'}" in err
    assert "diverges in layer 3" in err


PLAN = {
    "model": "builtin:quill", "target": "onnxruntime", "parameters": 3_400_000, "weights_bytes": 13_600_000, "peak_memory_bytes": None,
    "nodes": {"traced": 400}, "passes": {"cache_dynamic": 12}, "decode_bytes_per_token": 9_000_000, "problems": [],
}  # fmt: skip
PROBLEM = {"node": "aten.foo", "module": "model.layers.0", "source": "modeling.py:12", "why": "no translation", "fix": "decompose it"}


@pytest.mark.parametrize(("problems", "code"), [([], 0), ([PROBLEM], 4)])
def test_plan_says_what_would_be_made(
    converted: Converted, monkeypatch: pytest.MonkeyPatch, capsys: Output, problems: list[dict[str, str]], code: int
) -> None:
    plan = {**PLAN, "problems": problems}
    monkeypatch.setattr(pipeline, "plan", lambda recipe, progress: plan)
    assert cli.main([*CONVERT, "--plan"]) == code
    out = capsys.readouterr().out
    assert "weights           13.6 MB\n" in out
    assert "passes            cache_dynamic 12\n" in out
    assert ("aten.foo · model.layers.0 · modeling.py:12: no translation; decompose it" in out) == bool(problems)
    assert cli.main([*CONVERT, "--plan", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == plan
    assert converted.recipe is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no command was given"),
        (["conver"], "`conver` is not a command; did you mean `convert`?"),
        (["convert", "--target", "onnxruntime"], "no model was named"),
        (["convert", "m"], "no target was named"),
        (["convert", "m", "--target", "onnx-runtime"], "there is no target `onnx-runtime`; did you mean `onnxruntime`?"),
        (["convert", "m", "--taget", "onnxruntime"], "--taget; did you mean `--target`?"),
        (["convert", "m", "--taget=onnxruntime"], "--taget=onnxruntime; did you mean `--target`?"),
        (["convert", "m", "--tar", "onnxruntime"], "--tar"),
        (["convert", "m", "n", "--target", "onnxruntime"], "n  not expected here"),
        (["convert", "m", "-m", "n", "--target", "onnxruntime"], "two models were given"),
        (["convert", "m", "--precision", "fp23"], "did you mean `fp32`?"),
        (["convert", "m", "--logits", "lst"], "did you mean `last`?"),
        (["convert", "m", "--require", "builds"], "did you mean `build`?"),
        (["convert", "m", "--threads", "many"], "`many` is not a whole number, 0 or more"),
        (["generate", "m", "-p", "x", "--threads", "99999"], "99999 threads are more than any machine gains from, at most 512"),
        (["convert", "m", "--set", "padding"], "`padding` is not KEY=VALUE"),
        (["convert", "m", "--target", "onnxruntime", "--set", "a=1", "--set", "a=2"], "--set a=…"),
        (["convert", "m", "--target", "onnxruntime", "--max-memory", "lots"], "max_memory: must be a size"),
        (["convert", "--recipe", "none.yaml"], "none.yaml cannot be read"),
        (["convert", "m", "-o"], "expected one argument"),
        (["generate", "folder"], "the following arguments are required: -p/--prompt"),
        (["generate", "folder", "-p", "x", "--max-new-tokens", "0"], "`0` is not a whole number, 1 or more"),
        (["generate", "folder", "-p", "x", "--max-new-tokens", "-1"], "`-1` is not a whole number, 1 or more"),
        (["convert", "m", "--target", "onnxruntime", "-o", ""], "-o/--output: is empty"),
        (["report", "folder", "-o", ""], "-o/--output: is empty"),
        (["inspect", ""], "FOLDER: is empty"),
        (["validate"], "the following arguments are required: FOLDER"),
    ],
)
@pytest.mark.usefixtures("converted")
def test_bad_usage_is_named_with_the_nearest_right_one(capsys: Output, arguments: list[str], expected: str) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert "Fix: " in err
    assert out == ""


def test_bad_usage_is_json_where_json_was_asked_for(capsys: Output) -> None:
    assert cli.main(["validate", "--jsn", "--json", "folder"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["where"] == ["--jsn; did you mean `--json`?"]


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"]])
def test_help_and_version_are_no_errors(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert ("FOLDER" in capsys.readouterr().out) == (arguments[0] == "convert")


# The process as a whole.


def calque_process(arguments: list[str], cwd: Path, code: str = "") -> subprocess.Popen[str]:
    root = Path(calque.__file__).parents[1]
    main = textwrap.dedent(code) + "\nimport sys\nfrom calque.cli import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", main, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_cleans_up_and_exits_130(tmp_path: Path, sent: signal.Signals) -> None:
    code = """
        import time
        from calque import pipeline
        from calque.staging import staging
        def convert(recipe, out, *, force, progress):
            with staging(out, force) as folder:
                (folder / "half").touch()
                progress("ready")
                time.sleep(60)
        pipeline.convert = convert
    """
    process = calque_process(CONVERT, tmp_path, code)
    assert process.stderr is not None
    assert "ready" in process.stderr.readline()
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_crash(tmp_path: Path) -> None:
    write_proved_artifact(tmp_path / "out")
    code = """
        import time
        from calque import inspection
        inspection.artifact_text = lambda *_: "x" * 10**6
    """
    process = calque_process(["inspect", "out"], tmp_path, code)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize(("flags", "shown"), [([], False), (["-v"], True)])
def test_warnings_of_libraries_are_for_those_who_ask(tmp_path: Path, flags: list[str], shown: bool) -> None:
    code = """
        import warnings
        from calque import doctor
        doctor.examine = lambda: warnings.warn("from a library", FutureWarning) or []
    """
    process = calque_process(["doctor", *flags], tmp_path, code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert ("from a library" in err) is shown


def test_full_standard_output_is_one_line_and_no_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "calque.cli", "targets", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
