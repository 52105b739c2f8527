"""The memory that a conversion may use: refused before, kept while it runs, and a proof by blocks where the whole is too large."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from calque import ceiling, conversion, memory_plan, passes, pipeline, preflight
from calque.artifact import Artifact
from calque.console import size
from calque.errors import ParityFailed, UsageError, WontFit
from calque.passes.cache_dynamic import CacheDynamic
from calque.recipe import Recipe
from calque.targets._blocks import BlockSession
from calque.traced import TracedModel
from calque.validation.streamed import streamed
from tests.tiny_models import traced

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here


def settled(name: str = "llama") -> TracedModel:
    model = traced(name)
    passes.run([CacheDynamic()], model)
    return model


def quill(precision: str = "int4", **more: object) -> Recipe:
    scenarios = {"scenarios": ["single-prompt", "ragged-left", "chunked-prefill"]}
    return Recipe.of({"model": "builtin:quill", "target": "onnxruntime", "precision": precision, "parity": scenarios, "threads": 1, **more})


def test_work_that_passes_the_ceiling_is_ended_with_what_it_took() -> None:
    held = []

    def work() -> None:
        with ceiling.under(ceiling.tree_rss() + (64 << 20), lambda: "emit"):
            for _ in range(1000):
                held.append(torch.ones(1 << 20))
                time.sleep(0.001)

    with pytest.raises(WontFit, match=r"emit took .* are allowed") as caught:
        work()
    assert caught.value.exit_code == 6
    assert len(held) < 1000


def test_work_under_the_ceiling_is_left_alone() -> None:
    with ceiling.under(1 << 40, lambda: "emit"):
        total = sum(range(1000))
    assert total == 499500


def test_ceiling_is_over_with_its_block() -> None:
    with ceiling.under(ceiling.tree_rss() + (32 << 20), lambda: "emit"):
        pass
    held = torch.ones(16 << 20)
    time.sleep(3 * ceiling.SECONDS)
    assert held.sum() == 16 << 20


def test_memory_of_a_process_that_is_gone_is_none() -> None:
    assert ceiling.tree_rss() > 1 << 20
    assert ceiling.tree_rss(1 << 30) == 0


def test_what_cannot_fit_is_refused_with_the_least_that_would_do() -> None:
    model = settled()
    needs = preflight.peak_memory(model)
    with pytest.raises(WontFit) as caught:
        memory_plan.require_memory(model, 1 << 20, blocks=False)
    assert [line.split()[0] for line in caught.value.where] == ["convert", "prove"]
    least = max(needs["convert"], needs["prove"])
    assert memory_plan.require_memory(model, least, blocks=False) == 0
    with pytest.raises(WontFit):
        memory_plan.require_memory(model, least - 1, blocks=False)


def test_proof_runs_by_blocks_only_where_the_whole_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"convert": 100, "prove": 10**12, "prove_by_blocks": 10**9}
    monkeypatch.setattr(preflight, "peak_memory", lambda *_, **__: needs)
    model = settled()
    least = memory_plan.require_memory(model, 10**9, blocks=True)
    assert least == preflight.smallest_block(model)
    assert least < memory_plan.require_memory(model, 2 * 10**9, blocks=True) <= memory_plan.LARGEST_BLOCK
    assert memory_plan.require_memory(model, 10**12, blocks=True) == 0
    assert memory_plan.require_memory(model, None, blocks=True) == 0
    with pytest.raises(WontFit, match="does not fit into 2 GB"):
        memory_plan.require_memory(model, 2 * 10**9, blocks=False)


@pytest.mark.parametrize("activations", [pytest.param("int8", marks=pytest.mark.slow), pytest.param("dynamic", marks=pytest.mark.slow)])
def test_exact_blocks_round_nothing_whatever_the_artifact_does(activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "require_memory", lambda *_: 600_000)
    made = pipeline.convert(quill("int8").model_copy(update={"options": {"activations": activations}}), tmp_path / "out")
    assert made.proof is not None
    assert made.proof.numerics.worst is not None
    assert made.proof.numerics.worst < 1e-4


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int4"])
def test_proof_by_blocks_says_what_the_whole_proof_says(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline.convert(quill(precision), tmp_path / "whole")
    monkeypatch.setattr(memory_plan, "require_memory", lambda *_: 600_000)
    blocks = pipeline.convert(quill(precision), tmp_path / "blocks")
    assert whole.proof is not None
    assert blocks.proof is not None
    assert blocks.proof.numerics.by == "blocks"
    assert blocks.proof.numerics.status == "passed"
    assert blocks.proof.numerics.worst is not None
    assert blocks.proof.numerics.worst <= 10 * (whole.proof.numerics.worst or 0)
    assert blocks.proof.execution.status == "not_run"
    assert "blocks of 600 kB" in (blocks.proof.execution.reason or "")
    for name in ("model.onnx", "model.onnx.data", "reference/single-prompt.npz", "reference/ragged-left.npz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "blocks" / name).read_bytes(), name


def test_quality_that_memory_has_no_room_for_is_said_to_be_unknown_or_refused_where_a_limit_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = preflight.peak_memory
    monkeypatch.setattr(preflight, "peak_memory", lambda *given, **named: {**predicted(*given, **named), "prove": 1 << 40})
    asked: dict[str, Any] = {"max_memory": 4 << 30, "options": {"padding": "right"}, "parity": {"scenarios": ["single-prompt"]}}
    made = pipeline.convert(quill(**asked), tmp_path / "out")
    report = json.loads((made.folder / "report.json").read_text(encoding="utf-8"))
    assert report["quality"] == {}
    assert f"How good the model still is was not measured: that takes {size(1 << 40)} of memory" in " ".join(report["notes"])
    with pytest.raises(WontFit, match=r"how good the model is cannot be judged in 4\.3 GB of memory"):
        pipeline.convert(quill(**{**asked, "parity": {"max_kl": 0.1}}), tmp_path / "limit")


def test_text_that_cannot_be_read_is_said_before_the_model_is_looked_for(tmp_path: Path) -> None:
    for setting in ({"calibration": {"text": str(tmp_path / "none.txt")}}, {"parity": {"text": str(tmp_path / "none.txt")}}):
        with pytest.raises(UsageError, match=r"none.txt cannot be read"):
            pipeline.convert(
                Recipe.of({"model": "no-such-model", "target": "onnxruntime", "precision": "int4", **setting}), tmp_path / "out"
            )


def test_proof_by_blocks_fails_where_a_weight_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "require_memory", lambda *_: 600_000)
    opened = conversion.Conversion.in_blocks

    def damaged(self: conversion.Conversion, artifact: Artifact, exact: bool = False) -> object:
        path = artifact.folder / "model.onnx.data"
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
        path.write_bytes(data)
        return opened(self, artifact, exact)

    monkeypatch.setattr(conversion.Conversion, "in_blocks", damaged)
    with pytest.raises(ParityFailed):
        pipeline.convert(quill(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_node_of_an_artifact_is_in_one_block_and_large_products_are_cut(tmp_path: Path) -> None:
    artifact = pipeline.convert(quill(), tmp_path / "out")
    few, many = (BlockSession(artifact, 1, nbytes) for nbytes in (1 << 30, 100_000))
    assert len(few._blocks("model")[1]) == 1
    model, blocks = many._blocks("model")
    assert len(blocks) > 10
    assert [node.output[0] for block in blocks for node in block.nodes] == [node.output[0] for node in model.graph.node]
    assert any(node.output[0].endswith(".rows0") for node in model.graph.node)


def test_weight_that_the_table_lacks_is_no_weight_of_a_streamed_model() -> None:
    with pytest.raises(KeyError, match="weight"):
        streamed(torch.nn.Linear(2, 2), {})


def test_plan_of_what_cannot_fit_ends_as_its_conversion_would(tmp_path: Path) -> None:
    for work in (lambda: pipeline.plan(quill(max_memory="100MB")), lambda: pipeline.convert(quill(max_memory="100MB"), tmp_path / "out")):
        with pytest.raises(WontFit, match=r"does not fit into 100 MB|alone take .* are allowed") as caught:
            work()
        assert caught.value.exit_code == 6
    assert not list(tmp_path.iterdir())
    assert pipeline.plan(quill(max_memory="1TB"))["precision"] == "int4"


def test_less_memory_than_the_tools_take_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(WontFit, match="torch and transformers alone take"):
        pipeline.convert(Recipe(model="nowhere", target="onnxruntime", max_memory=200 << 20), tmp_path / "out")
