from __future__ import annotations

import importlib.metadata
import json

import pytest

from calque import cli, doctor


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Give a table of versions to pretend; None stands for a package that is not installed."""
    pretended: dict[str, str | None] = {}
    version = importlib.metadata.version

    def pretend(name: str) -> str:
        if name not in pretended:
            return version(name)
        found = pretended[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", pretend)
    return pretended


def finding(what: str) -> doctor.Finding:
    return next(found for found in doctor.examine() if found.what == what)


def test_everything_that_convert_needs_is_looked_at() -> None:
    found = {finding.what for finding in doctor.examine()}
    assert {
        "python",
        "cores",
        "memory",
        "disk",
        "numpy",
        "onnxruntime",
        "torch",
        "transformers",
        "pydantic",
        "onnxruntime providers",
    } <= found
    assert "pytest" not in found


def test_a_local_build_is_the_same_version(versions: dict[str, str | None]) -> None:
    versions["torch"] = "2.13.0+cu130"
    assert finding("torch").status == "ok"


def test_another_version_is_told(versions: dict[str, str | None]) -> None:
    versions["torch"] = "2.9.1"
    assert finding("torch") == doctor.Finding("torch", "2.9.1", "differs", "tested with 2.13.0")


def test_what_only_convert_needs_may_be_missing(versions: dict[str, str | None], capsys: pytest.CaptureFixture[str]) -> None:
    versions["torch"] = versions["onnx-ir"] = None
    assert cli.main(["doctor"]) == 0
    assert "convert: missing torch, onnx-ir; pip install 'calque[convert]'" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_for_convert"] == ["torch", "onnx-ir"]


def test_what_every_command_needs_must_be_there(versions: dict[str, str | None]) -> None:
    versions["numpy"] = None
    assert cli.main(["doctor"]) == 5


def test_a_checkout_that_is_not_installed_reads_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.examine()

    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert {found.what for found in doctor.examine()} == {found.what for found in installed}
