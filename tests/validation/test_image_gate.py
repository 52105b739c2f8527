"""The gate catches what is wrong in an image classifier, its graph or its batch, and lets through what is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calque.converters import vision
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.session import Session
from calque.source import ModelSource
from calque.traced import TracedModel, user_nodes
from calque.traced_session import TracedSession
from calque.validation.compare import Row, compare
from calque.validation.drive import ModelIO, depth_of
from calque.validation.reference import Reference, read_references
from calque.validation.scenarios import Scenario, of_images, unknown
from tests.mutations.graph_edits import attentions, feed, node_of, outputs, replace_by
from tests.tiny_vision import save_random
from tests.validation.gate import Broken

aten = torch.ops.aten
Arrays = dict[str, Any]
Run = Callable[[Arrays], Arrays]
BATCHES = {"batch-2", "batch-5", "batch-5-turned", "plain-images"}
ALL = {*BATCHES, "single-image"}
_KEPT: list[TemporaryDirectory[str]] = []


@cache
def classifier(model_type: str) -> tuple[TracedModel, ModelIO, list[tuple[Scenario, dict[str, Reference]]]]:
    """The traced graph, and what the eager model says of every scenario."""
    _KEPT.append(TemporaryDirectory(ignore_cleanup_errors=True))
    folder = Path(_KEPT[-1].name)
    save_random(folder / "model", model_type)
    artifact = convert(Recipe(model=str(folder / "model"), target="onnxruntime"), folder / "out")
    model = vision.trace(ModelSource.resolve(str(folder / "model"), scratch=folder))
    return model, ModelIO.of(artifact), list(read_references(artifact.folder))


def failed(session: Session, model_type: str) -> dict[str, Row]:
    _, io, references = classifier(model_type)
    rows = [compare(session, io, scenario, expected) for scenario, expected in references]
    assert {row["name"] for row in rows} == ALL
    return {row["name"]: row for row in rows if row["status"] == "failed"}


def labels_of_the_next_image(inputs: Arrays, run: Run) -> Arrays:
    return {"logits": np.roll(run(inputs)["logits"], 1, axis=0)}


def labels_of_the_first_image(inputs: Arrays, run: Run) -> Arrays:
    logits = run(inputs)["logits"]
    return {"logits": np.broadcast_to(logits[:1], logits.shape)}


def normalized_over_the_batch(inputs: Arrays, run: Run) -> Arrays:
    pixels = inputs["pixel_values"]
    return run({"pixel_values": pixels - pixels.mean(axis=0, keepdims=True) * 1e-2})


def height_and_width_exchanged(inputs: Arrays, run: Run) -> Arrays:
    return run({"pixel_values": np.swapaxes(inputs["pixel_values"], 2, 3)})


def channels_reversed(inputs: Arrays, run: Run) -> Arrays:
    return run({"pixel_values": inputs["pixel_values"][:, ::-1]})


def pixels_clipped(inputs: Arrays, run: Run) -> Arrays:
    return run({"pixel_values": inputs["pixel_values"].clip(-2.5, 2.5)})


def untouched(inputs: Arrays, run: Run) -> Arrays:
    return run(inputs)


@pytest.mark.parametrize("model_type", ["vit", "resnet"])
@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (labels_of_the_next_image, BATCHES),
        (labels_of_the_first_image, BATCHES),
        (normalized_over_the_batch, ALL),
        (height_and_width_exchanged, ALL),
        (channels_reversed, ALL),
        (pixels_clipped, ALL),
        (untouched, set()),
    ],
)
def test_fault_of_a_batch_is_caught_where_it_can_show(change: Callable[[Arrays, Run], Arrays], caught: set[str], model_type: str) -> None:
    assert failed(Broken(TracedSession(classifier(model_type)[0]), change), model_type).keys() == caught


def turned(kernel: Tensor) -> Tensor:
    return kernel.transpose(2, 3)


def convolution(model: TracedModel) -> Any:
    return user_nodes(list(model.graph.nodes), aten.conv2d.default)[0]


def patch_embedding_transposed(model: TracedModel) -> None:
    """Each patch is read column by column."""
    feed(model, convolution(model), 1, turned)


def patches_by_column(patches: Tensor) -> Tensor:
    return patches.transpose(2, 3)


def patches_in_another_order(model: TracedModel) -> None:
    """Patches meet the positions of those on the other side of the diagonal."""
    node = convolution(model)
    replace_by(model, node, patches_by_column, node)


def attention_causal(model: TracedModel) -> None:
    """A patch sees those before it alone."""
    for node in attentions(model):
        node.args = (*node.args[:7], True)


def heads_swapped(queries: Tensor) -> Tensor:
    return queries.roll(1, dims=1)


def query_heads_swapped(model: TracedModel) -> None:
    """The queries of a head meet the keys of another, in the last layer."""
    feed(model, attentions(model)[-1], 0, heads_swapped)


def images_mixed(hidden: Tensor) -> Tensor:
    return hidden.roll(1, dims=0)


def keys_of_another_image(model: TracedModel) -> None:
    """In the last layer an image attends to the one before it in the batch."""
    for place in (1, 2):
        feed(model, attentions(model)[-1], place, images_mixed)


def last_patch_for_the_first(model: TracedModel) -> None:
    """The head reads the last patch instead of the token of the class."""
    select = next(node for node in reversed(model.graph.nodes) if node.target is aten.select.int)
    select.args = (select.args[0], 1, -1)


def bias_of_the_head_lost(model: TracedModel) -> None:
    """The classifier's bias is left out."""
    head = outputs(model)["logits"]
    head.args = head.args[:2]


@pytest.mark.parametrize(
    ("mutate", "caught"),
    [
        (patch_embedding_transposed, ALL),
        (patches_in_another_order, ALL),
        (attention_causal, ALL),
        (query_heads_swapped, ALL),
        (keys_of_another_image, BATCHES),
        (last_patch_for_the_first, ALL),
        (bias_of_the_head_lost, ALL),
    ],
)
def test_wrong_graph_is_caught(mutate: Callable[[TracedModel], None], caught: set[str]) -> None:
    model = classifier("vit")[0].copy()
    mutate(model)
    model.graph.lint()
    assert failed(TracedSession(model), "vit").keys() == caught


@pytest.mark.parametrize("place", [3, 4])
def test_statistics_of_a_batch_norm_that_was_never_trained_are_caught(place: int) -> None:
    model = classifier("resnet")[0].copy()
    norm = user_nodes(list(model.graph.nodes), aten.batch_norm.default)[0]
    replace_by(model, node_of(norm.args[place]), torch.full_like, norm.args[place], float(place == 4))
    assert failed(TracedSession(model), "resnet").keys() == ALL


def test_each_image_stands_in_several_places_and_batches() -> None:
    places: dict[int, set[tuple[int, int]]] = {}
    for scenario in of_images():
        for place, (number,) in enumerate(scenario.rows):
            places.setdefault(number, set()).add((len(scenario.rows), place))
    five = {scenario.name: scenario.rows for scenario in of_images()}
    assert sorted(five["batch-5"]) == sorted(five["batch-5-turned"])
    assert all(one != other for one, other in zip(five["batch-5"], five["batch-5-turned"], strict=True))
    assert len(places[4]) == 5
    assert unknown(five) == {}


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ({"num_hidden_layers": 12}, 12),
        ({"depths": [3, 4, 6, 3]}, 16),
        ({"depths": [2, 2], "num_layers": 2}, 4),
        ({"depths": None}, 1),
        ({}, 1),
    ],
)
def test_depth_counts_the_layers_of_all_stages(config: dict[str, Any], depth: int) -> None:
    assert depth_of(config) == depth
