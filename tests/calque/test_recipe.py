from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from calque.errors import RecipeError
from calque.recipe import Recipe, default_folder, parse_size, unbuilt_settings

ROOT = Path(__file__).parents[2]

WHOLE = """
    schema: 1
    model: org/name@main
    task: text-generation-with-past
    target: onnxruntime
    precision: int4
    dims: {batch_size: [1, 1, 8], sequence_length: [1, 128, 2048], max_length: 4096}
    options: {padding: any}
    passes: [fuse_rms_norm, {quantize_weights: {group: 64}}]
    calibration: {text: data/corpus.txt, samples: 128}
    max_memory: 2GB
    parity: {scenarios: all}
    matrix: {target: [onnxruntime, tensorrt], precision: [fp16, int4]}
"""


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_text(text: str, **flags: Any) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(textwrap.dedent(text).lstrip())
        return Recipe.read(path, flags)

    return read_text


def problems(read: Any, text: str, **flags: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        read(text, **flags)
    assert caught.value.exit_code == 2
    return caught.value.where


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid_and_named_after_its_folder(path: Path) -> None:
    assert path.stem in Recipe.read(path).expand()


def test_the_recipe_of_the_contracts_is_read_whole(read: Any) -> None:
    recipe = read(WHOLE)
    assert recipe.precision == "int4"
    assert recipe.dims.batch_size == (1, 1, 8)
    assert recipe.dims.max_length == 4096
    assert recipe.passes == ("fuse_rms_norm", {"quantize_weights": {"group": 64}})
    assert recipe.calibration.samples == 128
    assert recipe.max_memory == 2_000_000_000


def test_little_is_needed(read: Any) -> None:
    recipe = read("model: builtin:quill\ntarget: onnxruntime\n")
    assert recipe.precision == "fp32"
    assert recipe.logits == "all"
    assert recipe.passes is None
    assert not recipe.random_weights
    assert not recipe.trust_remote_code
    assert recipe.threads == 0


def test_precision_follows_the_target_where_it_is_left_out() -> None:
    assert Recipe(model="m", target="tensorrt").precision == "fp16"
    assert Recipe(model="m", target="tensorrt", precision="fp32").precision == "fp32"


def test_an_empty_list_of_passes_means_none(read: Any) -> None:
    assert read("{model: m, target: t, passes: []}").passes == ()


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe(model="m", target="onnxruntime")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.model = "other"


def test_a_recipe_made_in_python_is_refused_with_every_problem_in_the_same_words() -> None:
    settings: dict[str, Any] = {"modle": "m", "target": "t", "precision": "int3"}
    with pytest.raises(RecipeError, match="3 problems in the recipe") as caught:
        Recipe(**settings)
    assert caught.value.where == (
        "precision: must be fp32, fp16, bf16, int8, int8-static, int4 or fp8; found 'int3'; did you mean `int8`?",
        "modle: is not a key of a recipe; did you mean `model`?",
        "model: is missing, and there is no default",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: m", "line 3: modle: is not a key of a recipe; did you mean `model`?"),
        ("dims: {max_len: 4}", "line 3: dims.max_len: is not a key of a recipe; did you mean `max_length`?"),
        ("matrix: {precison: [fp32]}", "line 3: matrix.precison: is not a key of a recipe; did you mean `precision`?"),
        ("xyzzy: 1", "line 3: xyzzy: is not a key of a recipe"),
        (
            "precision: int5",
            "line 3: precision: must be fp32, fp16, bf16, int8, int8-static, int4 or fp8; found 'int5'; did you mean `int8`?",
        ),
        ("threads: '4'", "line 3: threads: must be a whole number; found '4'"),
        ("threads: true", "line 3: threads: must be a whole number; found True"),
        ("random_weights: yes", "line 3: random_weights: must be true or false; found 'yes'"),
        ("task: 3", "line 3: task: must be text; put it in quotes; found 3"),
        ("logits: some", "line 3: logits: must be all, last or dynamic; found 'some'"),
        ("schema: 2", "line 3: schema: must be 1; found 2"),
        ("max_memory: 2 giggles", "line 3: max_memory: must be a size such as 2GB, 512MiB or 1.5GiB"),
        ("dims: {batch_size: [1, 8]}", "line 3: dims.batch_size: must be three whole numbers, min, typical, max; found [1, 8]"),
        (
            "dims: {batch_size: [0, 1, 8]}",
            "line 3: dims.batch_size: must be min, typical, max with 1 ≤ min ≤ typical ≤ max; found [0, 1, 8]",
        ),
        ("dims: [1]", "line 3: dims: must be a mapping of keys to values; found [1]"),
        ("parity: {scenarios: 3}", "line 3: parity.scenarios: must be all, or a list of scenario names; found 3"),
        ("calibration: {samples: 3}", "calibration.text: is missing, and there is no default"),
        ("matrix: {precision: []}", "line 3: matrix.precision: must not be empty; found []"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_nearest_key(read: Any, text: str, expected: str) -> None:
    assert problems(read, f"model: m\ntarget: t\n{text}\n") == (expected,)


def test_passes_are_names_or_one_name_with_options(read: Any) -> None:
    found = problems(read, "model: m\ntarget: t\npasses:\n  - ok\n  - {a: {}, b: {}}\n  - 3\n")
    assert [line.split(": must")[0] for line in found] == ["line 5: passes[1]", "line 6: passes[2]"]


def test_all_problems_come_at_once_in_the_order_of_their_lines(read: Any) -> None:
    found = problems(read, "threads: -1\ntarget: Onnx_Runtime\nrequire: runs\n")
    assert [line.split(":")[0] for line in found] == ["line 1", "line 2", "line 3", "model"]


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- a", "list"), ("text", "str")])
def test_a_file_that_is_no_mapping_is_refused(read: Any, text: str, found: str) -> None:
    assert problems(read, text) == (f"line 1: a recipe is a mapping of keys to values; found {found}",)


def test_flags_win_over_the_file(read: Any) -> None:
    recipe = read(
        "{model: m, target: t, precision: fp16, options: {a: 1, b: 2}, parity: {scenarios: [x]}}",
        precision="fp32", options={"b": 3}, parity={"scenarios": ["y"]},
    )  # fmt: skip
    assert recipe.precision == "fp32"
    assert recipe.options == {"a": 1, "b": 3}
    assert recipe.parity.scenarios == ("y",)


def test_a_flag_replaces_an_axis_of_the_matrix(read: Any) -> None:
    assert list(read(WHOLE, target="tensorrt").expand()) == ["name-tensorrt-fp16", "name-tensorrt-int4"]
    assert read(WHOLE, target="tensorrt", precision="fp32").matrix is None


def test_a_flag_with_a_wrong_value_is_named_without_a_line() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.of({"model": "m", "target": "t", "max_memory": "lots"})
    assert caught.value.where == ("max_memory: must be a size such as 2GB, 512MiB or 1.5GiB",)


def test_the_matrix_is_every_combination(read: Any) -> None:
    recipes = read(WHOLE).expand()
    assert list(recipes) == ["name-onnxruntime-fp16", "name-onnxruntime-int4", "name-tensorrt-fp16", "name-tensorrt-int4"]
    for folder, recipe in recipes.items():
        assert recipe.matrix is None
        assert default_folder(recipe) == folder
        assert (recipe.calibration is None) is (recipe.precision == "fp16")
        assert recipe.expand() == {folder: recipe}


def test_the_matrix_may_give_what_the_recipe_leaves_out(read: Any) -> None:
    recipes = read("matrix: {model: [builtin:quill, org/other], target: [onnxruntime, tensorrt]}").expand()
    assert list(recipes) == ["quill-onnxruntime-fp32", "quill-tensorrt-fp16", "other-onnxruntime-fp32", "other-tensorrt-fp16"]


def test_cells_that_would_share_a_folder_are_refused(read: Any) -> None:
    with pytest.raises(RecipeError, match=r"several cells would be written to name-t-fp32"):
        read("{target: t, matrix: {model: [a/name, b/name]}}").expand()


def test_settings_that_are_not_built_are_named_one_by_one(read: Any) -> None:
    assert unbuilt_settings(Recipe(model="m", target="t")) == []
    lines = unbuilt_settings(read(WHOLE))
    assert [line.split()[0].rstrip(":") for line in lines] == ["matrix"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_text_to_calibrate_on_is_refused_where_nothing_is_rounded_by_it(precision: Any) -> None:
    settings = {"model": "m", "target": "t", "calibration": {"text": "a.txt"}}
    assert unbuilt_settings(Recipe.of({**settings, "precision": "int4"})) == []
    assert unbuilt_settings(Recipe.of({**settings, "precision": precision})) == [
        f"calibration  {precision} rounds nothing that a text could be measured for"
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("512MiB", 2**29),
        ("1.5 GiB", 3 * 2**29),
        ("100", 100),
        ("7b", 7),
        ("3k", 3000),
        ("1T", 10**12),
        ("0.5gb", 5 * 10**8),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 giggles", "2iB", "1e9", "2GBB", "NaN"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("builtin:quill", "quill-t-fp32"),
        ("org/name", "name-t-fp32"),
        ("org/name@refs/pr/1", "name-t-fp32"),
        ("./some/Földer 1/", "F-lder-1-t-fp32"),
        ("/models/x/config.json", "x-t-fp32"),
        ("..", None),
    ],
)
def test_the_default_folder_is_named_after_model_target_and_precision(model: str, folder: str | None) -> None:
    expected = folder or f"{Path.cwd().parent.name}-t-fp32"
    assert default_folder(Recipe(model=model, target="t")) == expected


@given(model=st.text(min_size=1))
def test_the_default_folder_is_one_plain_name_whatever_the_model(model: str) -> None:
    folder = default_folder(Recipe(model=model.replace("\0", "") or "x", target="t"))
    assert Path(folder).name == folder
    assert not folder.startswith((".", "-"))


def test_the_manifest_holds_no_path_and_no_setting_of_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    settings = {"model": str(folder), "target": "t", "calibration": {"text": str(tmp_path / "corpus.txt")}}
    here = Recipe.of({**settings, "threads": 4, "max_memory": "2GB", "require": "build"})
    text = json.dumps(here.as_manifest())
    assert str(tmp_path) not in text
    assert here.as_manifest()["model"] == "my-model"
    assert here.as_manifest()["calibration"]["text"] == "corpus.txt"
    assert json.dumps(Recipe.of(settings).as_manifest()) == text


def test_the_manifest_holds_the_recipe_as_it_could_be_written(read: Any) -> None:
    recipe = read(WHOLE, model="builtin:quill", target="onnxruntime", precision="fp32")
    manifest = recipe.as_manifest()
    assert manifest["schema"] == 1
    assert manifest["passes"] == ["fuse_rms_norm", {"quantize_weights": {"group": 64}}]
    assert Recipe.of(manifest).as_manifest() == manifest


def test_the_json_schema_knows_every_key() -> None:
    schema = Recipe.model_json_schema()
    keys = "schema model task target precision dims options passes calibration max_memory parity matrix".split()  # noqa: SIM905
    assert set(keys) < set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "target"]


def test_the_documentation_lists_every_key() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [key for key in Recipe.model_json_schema()["properties"] if f"`{key}`" not in text] == []


def test_cells_of_a_matrix_that_round_nothing_are_told_nothing_of_rounding() -> None:
    settings = {"calibration": {"text": "a.txt"}, "options": {"padding": "right", "quantize_weights.group": 64}}
    cells = Recipe(model="m", target="onnxruntime", matrix={"precision": ["fp16", "int4"]}, **settings).expand()  # type: ignore[arg-type]
    wide, narrow = cells["m-onnxruntime-fp16"], cells["m-onnxruntime-int4"]
    assert (wide.calibration, wide.options) == (None, {"padding": "right"})
    assert narrow.calibration is not None
    assert narrow.options == settings["options"]
