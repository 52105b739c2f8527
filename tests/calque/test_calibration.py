from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from calque.calibration import Moments, Stream, observe, products_of
from calque.conversion import Conversion, open_target, resolve
from calque.converters import encoder
from calque.errors import SourceUnreadable, UsageError
from calque.recipe import Recipe
from calque.source import ModelSource
from calque.texts import spread_rows
from calque.weights import Stored
from tests.tiny_encoders import save_encoder
from tests.tiny_models import TINY, save_random, source_of, traced

Seen = dict[str, list[Tensor]]


def rows(count: int = 3, length: int = 12) -> list[list[int]]:
    return [np.random.default_rng(row).integers(3, 211, length + row).tolist() for row in range(count)]


def hooked(eager: Any, tokens: Sequence[Sequence[int]], **given: Any) -> Seen:
    """What the linear layers of the eager model read of each row, by the name of their weight."""
    seen: Seen = {}
    for name, module in eager.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(lambda _, read, name=name: seen.setdefault(f"{name}.weight", []).append(read[0]))
    with torch.no_grad():
        for row in tokens:
            eager(torch.tensor([row]), **given)
    return seen


def assert_same(seen: Seen, expected: Seen) -> None:
    assert seen.keys() == expected.keys()
    for name, values in expected.items():
        for value, found in zip(values, seen[name], strict=True):
            assert (found.reshape(value.shape) - value).abs().max() <= 1e-5 * value.std(), name


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow), "phi3", "bloom"])
def test_products_are_seen_to_read_what_the_eager_model_reads(name: str) -> None:
    seen: Seen = {}
    observe(traced(name), rows(), lambda weight, value: seen.setdefault(weight, []).append(value))
    assert_same(seen, hooked(source_of(name).load_eager(), rows(), use_cache=False))


def test_an_encoder_is_seen_to_read_what_eager_reads(tmp_path: Path) -> None:
    source = ModelSource.resolve(str(save_encoder(tmp_path, "bert")), scratch=tmp_path)
    seen: Seen = {}
    observe(encoder.trace(source), rows(), lambda weight, value: seen.setdefault(weight, []).append(value))
    expected = hooked(source.load_eager(), rows())
    assert_same(seen, {name: values for name, values in expected.items() if name in seen})
    assert len(seen) >= 12  # six products a layer


def test_the_blocks_are_what_comes_before_the_layers_each_layer_and_the_rest() -> None:
    model = traced("gemma2")
    blocks = Stream(model, rows(), products_of(model)).blocks
    assert [len(block.products) for block in blocks] == [0, 7, 7, 1]
    assert {name.split(".")[2] for name in (product.weight for product in blocks[2].products)} == {"1"}


def test_weights_of_one_block_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced("llama")
    read: list[int] = []
    once = Stored.read

    def counted(stored: Stored) -> Tensor:
        read.append(stored.offset)
        return once(stored)

    monkeypatch.setattr(Stored, "read", counted)
    counts: dict[str, int] = {}
    observe(model, rows(), lambda weight, _: counts.__setitem__(weight, len(read)))
    # When a product is first seen, weights of later layers have not been read; none is read again for other rows.
    assert counts["model.layers.0.mlp.down_proj.weight"] < counts["model.layers.1.mlp.down_proj.weight"] <= len(read)
    assert len(read) == len(set(read))


def test_tied_weights_are_seen_by_their_first_name() -> None:
    model = traced("gpt2")
    seen = set[str]()
    observe(model, rows(1), lambda weight, _: seen.add(weight))
    tied = model.weights.tied(next(name for name in seen if name in ("lm_head.weight", "transformer.wte.weight")))
    assert not seen & set(tied)


def test_moments_are_means_over_all_vectors() -> None:
    values = [torch.randn(2, 3, 5), torch.randn(4, 5)]
    moments = Moments()
    for value in values:
        moments.add(value)
    whole = torch.cat([value.reshape(-1, 5) for value in values])
    assert moments.count == 10
    torch.testing.assert_close(moments.absolute, whole.abs().mean(0))
    torch.testing.assert_close(moments.second, whole.t() @ whole / 10)


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """A tiny model whose tokenizer knows words and puts a mark before a text."""
    folder = save_random(TINY["llama"], tmp_path / "model")
    words = {"<s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, 60)}, "a": 60}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.enable_truncation(4)
    made.save(str(folder / "tokenizer.json"))
    return ModelSource.resolve(str(folder), scratch=tmp_path)


def text_of(path: Path, count: int) -> Path:
    path.write_text(" ".join(f"w{3 + number % 57}" for number in range(count)))
    return path


def test_rows_begin_as_the_tokenizer_begins_a_text_and_spread_over_it(source: ModelSource, tmp_path: Path) -> None:
    text = text_of(tmp_path / "text", 100)
    found = spread_rows(text, source, 3, longest=11)
    assert [len(row) for row in found] == [11, 11, 11]
    assert [row[0] for row in found] == [1, 1, 1]
    # Ten words a row: of ten rows that the text has, the first, the fourth and the seventh.
    assert [row[1] for row in found] == [3 + start % 57 for start in (0, 30, 60)]
    assert found == spread_rows(text, source, 3, longest=11)


def test_a_text_of_fewer_rows_than_asked_for_gives_those_it_has(source: ModelSource, tmp_path: Path) -> None:
    assert len(spread_rows(text_of(tmp_path / "text", 600), source, 128, None)) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "is no text: .* at byte 0"),
        (b"", "0 tokens"),
        (b"w3 w4", "too short to calibrate on: 2 tokens"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_with_the_reason(source: ModelSource, tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        spread_rows(file, source, 8, None)
    assert caught.value.exit_code == 2
    assert str(file) in caught.value.what


def test_a_model_without_a_tokenizer_cannot_be_calibrated_on_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no tokenizer"):
        spread_rows(text_of(tmp_path / "text", 600), source_of("llama"), 8, None)


def test_tokens_that_the_model_does_not_know_are_refused(source: ModelSource, tmp_path: Path) -> None:
    source.config.vocab_size = 40
    with pytest.raises(SourceUnreadable, match=r"gives token 59, the model of .* knows 40"):
        spread_rows(text_of(tmp_path / "text", 600), source, 8, None)


def test_the_trace_of_a_recipe_with_a_text_has_its_rows(source: ModelSource, tmp_path: Path) -> None:
    text = str(text_of(tmp_path / "text", 2000))
    settings = {"model": str(source.folder), "target": "onnxruntime", "precision": "int4"}
    recipe = Recipe.of({**settings, "calibration": {"text": text, "samples": 4}})
    conversion = Conversion(recipe, open_target(recipe), resolve(recipe, tmp_path / "scratch"))
    model = conversion.trace()
    assert [len(row) for row in model.samples] == [128] * 4  # as many positions as the model has
    assert conversion.trace().calibrations is model.calibrations
    plain = Recipe.of(settings)
    assert Conversion(plain, open_target(plain), source).trace().samples == ()
