from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from calque import cli, doctor
from calque.failures import explained


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
    fix = "in a checkout of Calque: pip install -c constraints.txt '.[convert]'"
    assert f"convert: missing torch, onnx-ir; {fix}" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_for_convert"] == ["torch", "onnx-ir"]


@pytest.mark.parametrize("name", ["torch", "onnx_ir.passes"])
def test_an_import_that_fails_names_all_that_is_missing(name: str, versions: dict[str, str | None]) -> None:
    versions["torch"] = versions["onnx-ir"] = None
    error = explained(ModuleNotFoundError(name=name), "convert")
    assert error is not None
    assert error.what == "calque convert needs torch, onnx-ir, which are not installed"
    assert error.fix == doctor.INSTALL_CONVERT


def test_an_import_that_fails_is_named_where_its_package_is_installed() -> None:
    error = explained(ModuleNotFoundError(name="torch"), "convert")
    assert error is not None
    assert error.what == "calque convert needs torch, which is not installed"


def test_the_readme_installs_as_the_advice_says() -> None:
    readme = (Path(doctor.PYPROJECT).parent / "README.md").read_text(encoding="utf-8")
    assert doctor.INSTALL_CONVERT.partition(": ")[2] in readme


def test_what_every_command_needs_must_be_there(versions: dict[str, str | None]) -> None:
    versions["numpy"] = None
    assert cli.main(["doctor"]) == 5


def test_a_checkout_that_is_not_installed_reads_its_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.examine()

    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert {found.what for found in doctor.examine()} == {found.what for found in installed}
