"""What goes wrong without a word in Core ML packages, and is caught: each is a fault of the converter that the gate must see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import calque
from calque.cli import main
from calque.errors import ParityFailed
from calque.recipe import Dims, Parity, Recipe
from tests.tiny_models import TINY, save_random, traced

pytest.importorskip("coremltools")

import torch
from coremltools.converters.mil.mil import Builder as mb

from calque.targets import _coreml_function, _coreml_rules
from tests.targets.coreml_packages import write

Rule = Callable[..., Any]
ATTENTION, WRITE = torch.ops.calque.attention.default, torch.ops.calque.write_slots.default


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(TINY["llama"], tmp_path_factory.mktemp("llama"))


@contextmanager
def broken(monkeypatch: pytest.MonkeyPatch, operator: Any, rule: Rule) -> Iterator[None]:
    """Meanwhile a rule is another."""
    table = {**_coreml_rules.rules(), operator: rule}
    with monkeypatch.context() as patch:
        patch.setattr(_coreml_rules, "rules", lambda: table)
        yield


def refused(model: Path, out: Path, *scenarios: str, **options: str) -> ParityFailed:
    """Return how the gate refuses what is written."""
    recipe = Recipe(
        model=str(model), target="coreml", precision="fp16", options=options, dims=Dims(max_length=48), parity=Parity(scenarios=scenarios)
    )
    with pytest.raises(ParityFailed) as caught:
        calque.convert(recipe, out)
    assert caught.value.exit_code == 3
    assert not out.exists()
    assert out.with_name(out.name + ".rejected").is_dir()
    return caught.value


def without_mask(f: Any, node: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """Attention that hides what comes later, and no padding."""
    from calque.targets._coreml_semantic import attention

    scale, softcap, sinks, _ = rest[1:]
    return attention(f, node, q, k, v, None, scale, softcap, sinks, True)


def with_a_lowest_number(f: Any, node: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, *_: Any) -> Any:
    """Attention whose mask is (1 - mask) · the lowest float32, in float16: 0 · -inf where nothing is hidden."""
    from calque.targets._coreml_semantic import _repeated

    groups = f.dims(q)[1] // f.dims(k)[1]
    key, value = (_repeated(f, f.value(part), part, groups) for part in (k, v))
    with np.errstate(over="ignore"):
        lowest = np.float16(np.finfo(np.float32).min)
    hidden = mb.cast(x=mb.logical_not(x=f.value(mask)), dtype="fp16")
    scores = mb.mul(x=mb.matmul(x=f.value(q), y=key, transpose_y=True), y=np.float16(scale))
    return mb.matmul(x=mb.softmax(x=mb.add(x=scores, y=mb.mul(x=hidden, y=lowest)), axis=-1), y=value)


def not_kept(f: Any, node: Any, past: Any, new: Any, write_indices: Any) -> Any:
    """Slots that are read with what is new, and never written back."""
    from calque.targets._coreml_semantic import write_slots

    states = f.states
    f.value(past)
    f.states = {}
    try:
        return write_slots(f, node, past, new, write_indices)
    finally:
        f.states = states


def test_a_mask_that_overflows_float16_ends_with_3(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", "--target", "coreml", str(llama), "-o", str(tmp_path / "out"), "--max-length", "48", "--precision", "fp16"]
    with broken(monkeypatch, ATTENTION, with_a_lowest_number):
        assert main(arguments) == 3
    assert not (tmp_path / "out").exists()
    assert "NaN or infinity" in "".join(capsys.readouterr())


def test_a_mask_that_is_gone_is_seen(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with broken(monkeypatch, ATTENTION, without_mask):
        refused(llama, tmp_path / "out", "ragged-left")


def test_a_state_that_is_not_written_is_seen(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with broken(monkeypatch, WRITE, not_kept):
        refused(llama, tmp_path / "out", "decode-16", cache="stateful")


def test_lengths_of_the_trace_are_seen(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = _coreml_function.Building.shape

    def baked(self: Any, sizes: Any, inferred: bool = True) -> Any:
        return shape(self, [size if isinstance(size, int) else 3 for size in sizes], inferred)

    monkeypatch.setattr(_coreml_function.Building, "shape", baked)
    refused(llama, tmp_path / "out", "single-prompt")


def test_weights_that_are_there_twice_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _coreml_function.Building.weight

    def of_each_function(self: Any, *arguments: Any) -> Any:
        held = weight(self, *arguments)
        held.op._weight_id = f"{self.signature.name}_{arguments[1]}"
        return held

    monkeypatch.setattr(_coreml_function.Building, "weight", of_each_function)
    with pytest.raises(AssertionError, match="are there twice"):
        write(traced("llama"), functions="split")


def test_an_operator_that_nothing_here_runs_is_refused_by_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from calque.runtime import mil

    monkeypatch.setattr(mil, "OPERATORS", tuple(name for name in mil.OPERATORS if name != "silu"))
    arguments = ["convert", "--target", "coreml", str(llama), "-o", str(tmp_path / "out"), "--max-length", "48"]
    assert main(arguments) == 4
    said = "".join(capsys.readouterr())
    assert "silu" in said
    assert not (tmp_path / "out").exists()
