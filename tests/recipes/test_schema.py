"""The JSON schema for editors: up to date, and of one mind with the recipes that are read and refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

from calque import passes, recipe_names, targets
from calque.errors import RecipeError
from calque.recipe import Recipe
from calque.strict_yaml import parse_document, read_document

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
HEAD = "# yaml-language-server: $schema="


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_schema", ROOT / "docs" / "recipe_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(data: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)]


def test_the_schema_is_what_recipes_are(generator: ModuleType) -> None:
    assert generator.FILE.read_text(encoding="utf-8") == generator.text(), "run docs/recipe_schema.py"


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_is_described() -> None:
    assert [key for key, value in SCHEMA["properties"].items() if not value.get("description")] == []
    parts = {name: part for name, part in SCHEMA["$defs"].items() if "properties" in part}
    inner = {f"{name}.{key}": value for name, part in parts.items() for key, value in part["properties"].items()}
    assert [key for key, value in inner.items() if not value.get("description")] == []


def test_every_target_and_pass_is_known_with_its_options() -> None:
    assert SCHEMA["properties"]["target"]["enum"] == targets.built_in()
    names, with_options = SCHEMA["$defs"]["Pass"]["anyOf"]
    assert names["enum"] == sorted(with_options["properties"]) == passes.built_in()
    assert with_options["properties"]["pool_sentences"]["properties"]["pooling"]["default"] == "mean"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_follows_the_schema_and_names_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(HEAD)
    assert (path.parent / first.removeprefix(HEAD)).samefile(ROOT / "recipes" / "recipe.schema.json")
    assert faults(read_document(path).data) == []
    assert recipe_names.problems(Recipe.read(path)) == []


GIVEN = "model: m\ntarget: onnxruntime\n"


@pytest.mark.parametrize(
    "text",
    [
        GIVEN,
        "matrix: {model: [a, b], target: [onnxruntime], precision: [fp32, int4]}",
        GIVEN + "passes: [cache_dynamic, {transpose_linear: {}}, {keep_last_logits: {keep: dynamic}}]",
        GIVEN + "passes: []\nmax_memory: 1.5 GiB\nthreads: 2\nrequire: execution",
        GIVEN + "dims: {batch_size: [1, 2, 4], max_length: 64}\nparity: {scenarios: [single-prompt, past-window-8-left]}",
        GIVEN + "options: {operators: standard}\ncalibration: {text: a.txt}\nmax_memory: 5",
    ],
)
def test_what_is_read_follows_the_schema(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert faults(read_document(path).data) == []
    assert recipe_names.problems(Recipe.read(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "target: onnxruntime",
        "model: m",
        "{model: m, target: onnx}",
        "matrix: {model: [a]}",
        GIVEN + "modle: m",
        GIVEN + "schema: 2",
        GIVEN + "precision: fp23",
        GIVEN + "options: {paddings: any}",
        GIVEN + "options: {operators: other}",
        GIVEN + "passes: [fuse]",
        GIVEN + "passes: [{keep_last_logits: {keep: first}}]",
        GIVEN + "passes: [{keep_last_logits: {kep: last}}]",
        GIVEN + "passes: [{cache_dynamic: {}, transpose_linear: {}}]",
        GIVEN + "matrix: {}",
        GIVEN + "matrix: {precision: []}",
        GIVEN + "matrix: {precision: [fp32, fp32]}",
        GIVEN + "matrix: {target: [onnx]}",
        GIVEN + "dims: {batch_size: [1, 8]}",
        GIVEN + "dims: {batch_size: [0, 1, 8]}",
        GIVEN + "parity: {scenarios: []}",
        GIVEN + "parity: {scenarios: [single]}",
        GIVEN + "max_memory: lots",
        GIVEN + "threads: -1",
        GIVEN + "random_weights: yes",
        GIVEN + "task: 3",
        "- model",
    ],
)
def test_what_the_schema_refuses_is_refused_where_it_is_read(text: str, tmp_path: Path) -> None:
    assert faults(parse_document(text, "the text").data)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    try:
        found = recipe_names.problems(Recipe.read(path))
    except RecipeError as error:
        found = [((), line) for line in error.where]
    assert found
