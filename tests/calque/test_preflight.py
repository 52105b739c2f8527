from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calque import passes, preflight
from calque.console import size
from calque.errors import WeightMismatch, WontFit
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.cache_static import CacheStatic
from calque.passes.quantize_weights import QuantizeWeights
from calque.passes.transpose_linear import TransposeLinear
from calque.weights import PIECE_BYTES
from tests.tiny_models import source_of, traced


def disk_with(free: int) -> Any:
    return lambda _: shutil._ntuple_diskusage(free, 0, free)


@pytest.fixture(autouse=True)
def memory_of_one_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "bandwidth", lambda: 1e10)


def elements_of(name: str) -> int:
    return sum(math.prod(stored.shape) for stored in source_of(name).tensors.values())


def test_disk_that_is_large_enough_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = elements_of("llama") * 4 + preflight.companion_bytes(source_of("llama"))
    monkeypatch.setattr(shutil, "disk_usage", disk_with(needed))
    preflight.require_disk(source_of("llama"), tmp_path)


def test_disk_that_is_too_small_is_refused_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk_with(10_000))
    with pytest.raises(WontFit) as caught:
        preflight.require_disk(source_of("llama"), tmp_path)
    needed = elements_of("llama") * 4 + preflight.companion_bytes(source_of("llama"))
    assert f"needs {size(needed)} on disk, 10 kB are free where the output goes" in str(caught.value)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_parameters_are_counted_once_each_tied_or_not(name: str) -> None:
    sizes = preflight.sizes(traced(name))
    eager = source_of(name).load_eager()
    assert sizes["parameters"] == sum(parameter.numel() for parameter in eager.parameters())
    assert sizes["weights_bytes"] == 4 * sizes["parameters"]


def test_sizes_do_not_change_with_passes_that_only_move_bytes() -> None:
    plain, rewritten = traced("llama"), traced("llama")
    passes.run([CacheDynamic(), TransposeLinear()], rewritten)
    one, other = preflight.sizes(plain), preflight.sizes(rewritten)
    assert {key: one[key] for key in one if key != "peak_memory_bytes"} == {key: other[key] for key in other if key != "peak_memory_bytes"}


def test_table_that_a_token_reads_one_row_of_is_not_read_for_each_token() -> None:
    model = traced("llama")
    embedding = model.weights["model.embed_tokens.weight"]
    sizes = preflight.sizes(model)
    assert sizes["weights_bytes"] - sizes["decode_bytes_per_token"] == 4 * math.prod(embedding.shape)


def test_tied_head_is_read_whole_for_each_token() -> None:
    model = traced("gpt2")
    sizes = preflight.sizes(model)
    # The table of positions is looked up alone; the tokens' is the head as well.
    assert sizes["weights_bytes"] - sizes["decode_bytes_per_token"] == 4 * math.prod(model.weights["transformer.wpe.weight"].shape)


def test_decoding_is_bounded_by_reading_every_weight_once_a_token() -> None:
    sizes = preflight.sizes(traced("llama"))
    assert sizes["decode_tokens_per_s_at_best"] == round(1e10 / sizes["decode_bytes_per_token"], 1)


def test_memory_for_converting_does_not_hold_the_model() -> None:
    model = traced("llama")
    sizes = preflight.sizes(model)
    memory, tools = sizes["peak_memory_bytes"], preflight.TOOLS_BYTES + preflight.NODE_BYTES * len(model.graph.nodes)
    assert memory["convert"] == tools + preflight.PIECE_COPIES * PIECE_BYTES  # all else is smaller than a piece
    answers = preflight.PROOF_POSITIONS * 4 * model.weights["lm_head.weight"].shape[0]
    assert memory["prove"] == tools + preflight.RUNTIME_BYTES + answers + sizes["weights_bytes"]


def test_memory_for_proving_holds_the_checkpoint_and_what_is_made_of_it_while_that_is_loaded() -> None:
    model, stored = traced("llama"), 1 << 30
    tools = preflight.TOOLS_BYTES + preflight.NODE_BYTES * len(model.graph.nodes)
    assert preflight.peak_memory(model, stored)["prove"] == tools + stored + preflight.sizes(model)["weights_bytes"]


def test_table_that_a_product_reads_too_is_twice_in_the_runtime() -> None:
    tied, model = traced("gpt2"), traced("llama")
    table = 4 * math.prod(tied.weights["lm_head.weight"].shape)
    assert preflight._opened_bytes(tied) == preflight.weights_bytes(tied) + table
    assert preflight._opened_bytes(model) == preflight.weights_bytes(model)


def test_integers_are_kept_on_the_disk_beside_the_artifact_until_the_end() -> None:
    model = traced("llama")
    assert preflight.integers_bytes(model) == 0
    passes.run([QuantizeWeights(embedding="int4", head="int4")], model)
    elements = sum(math.prod(weight.shape) for weight in model.replaced.values())
    assert preflight.integers_bytes(model) == elements // 2 + elements // 32 * 4


@pytest.mark.parametrize(("size", "promised"), [("hidden_size", 10**6), ("vocab_size", 10**6), ("num_hidden_layers", 1000)])
def test_sizes_that_no_tensor_of_the_checkpoint_has_are_refused_before_anything_is_built(size: str, promised: int) -> None:
    source = source_of("llama")
    config = type(source.config).from_dict({**source.config.to_dict(), size: promised})
    with pytest.raises(WeightMismatch) as caught:
        preflight.require_tensors(replace(source, config=config))
    assert [line.split("  ")[0] for line in caught.value.where] == [f"{size}: {promised}"]


def test_slots_that_no_memory_holds_are_refused_with_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced("llama")
    passes.run([CacheStatic(1000)], model)
    per_row = 2 * 2 * 2 * 1000 * 24 * 4  # layers, key and value, heads, slots, size, bytes
    assert preflight.cache_bytes(model) == per_row
    monkeypatch.setattr(preflight, "total_memory", lambda: 10 * per_row)
    preflight.require_cache(model)
    monkeypatch.setattr(preflight, "total_memory", lambda: 10 * per_row - 1)
    with pytest.raises(WontFit, match="1000 slots") as caught:
        preflight.require_cache(model)
    assert "--max-length" in caught.value.fix


def test_a_cache_that_grows_asks_for_no_slots() -> None:
    model = traced("llama")
    passes.run([CacheDynamic()], model)
    assert preflight.cache_bytes(model) == 0
