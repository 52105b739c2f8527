"""One command measures all: what it tells the two that measure."""

from __future__ import annotations

from pathlib import Path

from benchmarks import run
from benchmarks.conversion.run import parse as parse_conversion
from benchmarks.decoding.run import parse as parse_decoding


def test_both_measurements_get_the_shape_and_folders_of_their_own() -> None:
    """What one command line says, both understand."""
    args = run.parse(["--shapes", "S", "--repeat", "1", "--rounds", "2", "--work", "w", "--results", "r", "--resume"])
    convert, decode = run.commands(args, "S")
    converting, decoding = parse_conversion(convert), parse_decoding(decode)
    assert (converting.shapes, converting.repeat, converting.results) == (["S"], 1, Path("r/conversion"))
    assert (decoding.shapes, decoding.rounds, decoding.results) == (["S"], 2, Path("r/decoding"))
    assert converting.work == decoding.work == Path("w")
    assert converting.resume
    assert decoding.resume


def test_large_artifacts_are_deleted_once_they_are_measured() -> None:
    """Of the small shapes they stay."""
    args = run.parse([])
    assert args.shapes == ["S", "M", "L"]
    assert [parse_decoding(run.commands(args, shape)[1]).discard for shape in args.shapes] == [[], ["M"], ["L"]]
    assert parse_conversion(run.commands(args, "L")[0]).results == Path(run.__file__).parent / "conversion"


def test_a_measured_shape_is_left_out_when_resuming(tmp_path: Path) -> None:
    """Its results are there: no tool is needed, no environment made."""
    for name in ("conversion", "decoding"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results-S.md").touch()
    assert run.main(["--shapes", "S", "--work", str(tmp_path / "work"), "--results", str(tmp_path), "--resume"]) == 0
    assert not (tmp_path / "work").exists()
