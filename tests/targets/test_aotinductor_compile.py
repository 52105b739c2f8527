"""How packages of AOTInductor are compiled: by which compiler, with which weights, and what is said where that fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from calque import pipeline
from calque.artifact import SHARED_WEIGHTS, TensorSpec
from calque.errors import TargetUnavailable, Unsupported
from calque.recipe import Recipe
from calque.targets import _aotinductor_compile, _aotinductor_graphs
from calque.targets.aotinductor import AOTInductor


def test_without_a_compiler_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TargetUnavailable, match="no-such-compiler") as caught:
        pipeline.convert(Recipe(model="builtin:quill", target="aotinductor"), tmp_path / "out")
    assert caught.value.exit_code == 5
    assert [*tmp_path.iterdir()] == []
    assert ("C++ compiler", "missing") in [row[:2] for row in AOTInductor().doctor()]


def test_a_compiler_may_be_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "env g++ -DNDEBUG")
    assert _aotinductor_compile.find_compiler() == [shutil.which("env"), "g++", "-DNDEBUG"]
    with _aotinductor_compile._workshop(tmp_path) as script:
        assert script.name == "g++", "Inductor tells compilers apart by their names"
        assert f"exec {shutil.which('env')} g++ -DNDEBUG " in script.read_text()
    monkeypatch.setenv("CXX", "")
    assert _aotinductor_compile.find_compiler() == [shutil.which("g++")]


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1500, 1200))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


def exported(dynamic: bool) -> Any:
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    return torch.export.export(Twice(), (torch.zeros(3, 1200),), dynamic_shapes=shapes)


def test_a_compiler_that_does_not_work_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(TargetUnavailable, match="compiler that works"):
        AOTInductor().require(None)


def test_what_the_compiler_refuses_is_told_with_its_last_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "g++"
    script.write_text('#!/bin/sh\ncase "$*" in *model.*cpp*) echo "error: it is too hot" >&2; exit 1;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(Unsupported, match="refuses the code") as caught:
        _aotinductor_compile.compile_package(exported(True), tmp_path / "m.pt2", tmp_path, _aotinductor_compile.Compiler())
    assert caught.value.where[-1] == "error: it is too hot"
    assert [path.name for path in tmp_path.iterdir()] == ["g++"]


def test_a_dimension_that_was_baked_in_is_refused() -> None:
    spec = TensorSpec("x", "float32", ("batch_size", 1200))
    _aotinductor_graphs.require_dynamic(exported(True), [spec], "model.pt2")
    with pytest.raises(Unsupported, match="no shapes but those") as caught:
        _aotinductor_graphs.require_dynamic(exported(False), [spec], "model.pt2")
    assert caught.value.where == ("x  ['batch_size', 1200] became ['3', '1200']",)


class Scaled(torch.nn.Module):
    """Like Gemma's embeddings: a weight of one number, in float32, that is rounded before it is used."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(8.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * self.scale.to(torch.bfloat16),)


def test_a_weight_of_one_number_is_read_and_not_part_of_the_code(tmp_path: Path) -> None:
    program = torch.export.export(Scaled(), (torch.ones(3, dtype=torch.bfloat16),))
    _aotinductor_compile.compile_package(program, tmp_path / "m.pt2", tmp_path, _aotinductor_compile.Compiler())
    package: Any = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    for scale in (8.0, 3.0):
        package.load_constants({"scale": torch.tensor(scale)}, check_full_update=False)
        assert package(torch.ones(3, dtype=torch.bfloat16))[0].tolist() == [scale] * 3


@pytest.mark.slow
def test_weights_that_are_in_the_package_too_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = _aotinductor_compile.Compiler.configs
    inside = {"aot_inductor.package_constants_in_so": True}
    monkeypatch.setattr(_aotinductor_compile.Compiler, "configs", lambda self, cxx: configs(self, cxx) | inside)
    package, weights = tmp_path / "m.pt2", tmp_path / SHARED_WEIGHTS
    weights.write_bytes(bytes(4 * 1500 * 1200))
    program = exported(True)
    _aotinductor_compile.compile_package(program, package, tmp_path, _aotinductor_compile.Compiler())
    with pytest.raises(AssertionError, match="weights are in it twice"):
        _aotinductor_compile.require_bare(package, program, weights)
