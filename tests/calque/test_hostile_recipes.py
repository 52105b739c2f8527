"""Recipes that are wrong in every way a file can be: exit 2, the line, a way out, and nothing done."""

from __future__ import annotations

from pathlib import Path

import pytest

from calque import cli, pipeline
from calque.errors import UsageError
from calque.recipe import Recipe
from calque.strict_yaml import LARGEST

Output = pytest.CaptureFixture[str]

GIVEN = b"model: builtin:quill\ntarget: onnxruntime\n"
BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c]\n" % (now, now, last, last) for last, now in zip(b"abcdefgh", b"bcdefghi", strict=True)
)

HOSTILE = {
    "alias-bomb": (BOMB, "line 1: an alias"),
    "alias-of-itself": (GIVEN + b"options: &a {b: *a}", "line 3: an alias"),
    "merge-key": (GIVEN + b"<<: {threads: 2}", "line 3: <<: is not a key"),
    "tag-that-runs": (GIVEN + b"task: !!python/object/apply:os.system ['true']", "line 3: a tag"),
    "binary-tag": (GIVEN + b"task: !!binary aGVsbG8=", "line 3: a tag"),
    "not-text": (b"\x7fELF\x02\x01\x01\x00\x00", "line 1: character 127"),
    "not-utf-8": (GIVEN + b"task: \xff\xfe", "line 3: invalid start byte"),
    "utf-16": ("model: m".encode("utf-16"), "line 1: invalid start byte"),
    "control-character": (GIVEN + b"task: a\x07b", "line 3: character 7"),
    "escaped-zero": (b'target: onnxruntime\nmodel: "a\\0b"', "line 2: 'a\\x00b' holds a character that is no text"),
    "half-a-pair": (b'target: onnxruntime\nmodel: "\\ud800"', "line 2: '\\ud800' holds a character that is no text"),
    "deep-flow": (b"a: " + b"[" * 20000, "line 1: more than 16 levels"),
    "deep-block": (b"".join(b" " * depth + b"a:\n" for depth in range(200)), "line 17: more than 16 levels"),
    "two-documents": (GIVEN + b"---\n" + GIVEN, "line 3: but found another document"),
    "unfinished": (GIVEN + b"options: {", "line 3: expected"),
    "huge-number": (GIVEN + b"threads: " + b"9" * 5000, "line 3: '9999"),
    "many-threads": (GIVEN + b"threads: 100000", "line 3: threads: input should be less than or equal to 512"),
    "wrong-type": (GIVEN + b"dims: [1, 2, 3]", "line 3: dims: must be a mapping"),
    "list": (b"\n- model\n", "line 1: a recipe is a mapping"),
    "empty": (b"", "found nothing"),
    "unknown-key": (GIVEN + b"tresholds: 2", "line 3: tresholds: is not a key of a recipe; did you mean `threads`?"),
    "unknown-target": (b"model: m\ntarget: onnxruntim", "line 2: target: there is no target `onnxruntim`; did you mean `onnxruntime`?"),
    "unknown-task": (GIVEN + b"task: text-genration", "line 3: task: there is no task 'text-genration'; did you mean"),
    "unknown-scenario": (
        GIVEN + b"parity:\n  scenarios:\n  - batch-2\n  - raged-left",
        "line 6: parity.scenarios[1]: no model has a scenario `raged-left`",
    ),
    "unknown-pass": (
        GIVEN + b"passes:\n- cache_dynamc",
        "line 4: passes[0]: there is no pass 'cache_dynamc'; did you mean `cache_dynamic`?",
    ),
    "unknown-pass-option": (
        GIVEN + b"passes: [{keep_last_logits: {kep: last}}]",
        "line 3: passes[0]: pass keep_last_logits has no option kep",
    ),
    "wrong-pass-option": (GIVEN + b"passes: [{keep_last_logits: {keep: 3}}]", "line 3: passes[0]: pass keep_last_logits cannot take"),
    "unknown-option": (GIVEN + b"options:\n  operatrs: standard", "line 4: options.operatrs: target onnxruntime has no such option"),
    "wrong-option": (GIVEN + b"options:\n\n  operators: 3", "line 5: options.operators: target onnxruntime: Input should be 'fused'"),
    "two-cuts-of-logits": (GIVEN + b"logits: last\npasses: [keep_last_logits]", "line 4: passes: logits: last and the pass"),
    "empty-matrix": (GIVEN + b"matrix: {}", "line 3: matrix: must list something"),
    "empty-axes": (GIVEN + b"matrix: {model: null, precision: null}", "line 3: matrix: must list something"),
    "empty-axis": (GIVEN + b"matrix:\n  target: []", "line 4: matrix.target: must not be empty"),
    "cells-twice": (
        GIVEN + b"matrix:\n  precision: [fp32, fp16, fp32]",
        "line 4: matrix.precision: must name each once; named again: fp32",
    ),
    "cells-of-one-name": (
        b"target: onnxruntime\nmatrix:\n  model: [a/same, b/same]",
        "line 2: matrix: several cells would be written to same-",
    ),
    "target-in-matrix": (
        b"model: m\nmatrix:\n  target: [onnxruntime, onxruntime]",
        "line 3: matrix.target[1]: there is no target `onxruntime`",
    ),
    "endless-matrix": (
        b"target: onnxruntime\nmatrix: {model: [%s], precision: [fp32, fp16]}" % b",".join(b"a/%d" % i for i in range(600)),
        "line 2: matrix: has 1200 cells; the most are 1000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_recipe_ends_in_exit_2_with_its_line_before_any_work(
    name: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = HOSTILE[name]
    Path("recipe.yaml").write_bytes(text)
    assert cli.main(["convert", "--recipe", "recipe.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert "line " in err
    assert err.splitlines()[-1].startswith("Fix: ")
    assert len(err) < 4000
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_faults_of_schema_and_names_come_at_once_in_the_order_of_their_lines(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "modle: x\ntarget: onnxruntim\nprecision: int3\npasses: [cache_dynamc]\ntask: text-genration\n"
        "parity: {scenarios: [raged-left]}\nmatrix: {model: [a/same, b/same]}\n"
    )
    assert cli.main(["convert", "--recipe", str(path), "--threads", "5000"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("RecipeError: 8 problems in ")
    found = [line.strip().split(":")[:2] for line in lines[1:8]]
    keys = ("modle", "target", "precision", "passes[0]", "task", "parity.scenarios[0]", "matrix")
    assert found == [[f"line {number}", f" {key}"] for number, key in enumerate(keys, 1)]
    assert lines[8].startswith("  threads: input should be")


@pytest.mark.parametrize("fault", ["target: [x]", "matrix: {target: [Not_A_Name]}", "matrix: {target: [onnxruntime], precison: [fp32]}"])
def test_names_are_looked_up_where_the_target_itself_is_at_fault(fault: str, tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{fault}\nmodel: m\nparity: {{scenarios: [raged-left]}}\n")
    assert cli.main(["convert", "--recipe", str(path)]) == 2
    err = capsys.readouterr().err
    assert "line 1: " in err
    assert "line 3: parity.scenarios[0]: no model has a scenario `raged-left`" in err
    assert "there is no target" not in err, "the name that stands in for the faulty one is nobody's"


@pytest.mark.parametrize("flags", [["--plan"], ["--resume"], ["--json"], ["--force"]])
def test_a_bad_name_is_refused_whatever_is_asked_for(flags: list[str], tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(GIVEN + b"parity: {scenarios: [typo]}")
    assert cli.main(["convert", "--recipe", str(path), "-o", str(tmp_path / "out"), *flags]) == 2
    assert "no model has a scenario `typo`" in capsys.readouterr().err


def test_a_file_larger_than_any_recipe_is_not_read_whole(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(GIVEN + b"#" * LARGEST)
    for name in (str(path), "/dev/zero"):
        assert cli.main(["convert", "--recipe", name]) == 2
        assert "larger than 64 KiB" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["none.yaml", ".", "a\0b", "x" * 5000])
def test_a_file_that_cannot_be_read_is_named(name: str, capsys: Output) -> None:
    assert cli.main(["convert", "--recipe", name]) == 2
    err = capsys.readouterr().err
    assert "cannot be read" in err
    assert "Fix: " in err


def test_a_model_after_the_recipe_is_told_where_it_must_stand(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_bytes(GIVEN)
    Path("llama").mkdir()
    for name, reason in (("llama", "Is a directory"), ("org/name", "No such file or directory")):
        assert cli.main(["convert", "--recipe", "recipe.yaml", name]) == 2
        err = capsys.readouterr().err
        assert f"{name} cannot be read: {reason}" in err
        assert "a MODEL must stand before" in err


def test_the_largest_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GIVEN + b"#" * (LARGEST - len(GIVEN) - 3))
    assert Recipe.read(path).model == "builtin:quill"


def test_the_pipeline_refuses_an_unknown_scenario_before_it_reads_a_model(tmp_path: Path) -> None:
    recipe = Recipe.of({"model": "no/such-model", "target": "onnxruntime", "parity": {"scenarios": ["typo"]}})
    with pytest.raises(UsageError, match="no model has these scenarios"):
        pipeline.convert(recipe, tmp_path / "out")
