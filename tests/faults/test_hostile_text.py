"""Random and hostile text for everything that reads what strangers wrote: recipes, checkpoint headers, manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from calque import checkpoint
from calque.artifact import MANIFEST, Artifact
from calque.errors import ArtifactUnreadable, CalqueError, RecipeError, SourceUnreadable, UsageError
from calque.recipe import Recipe
from calque.staging import check_output, is_artifact
from calque.strict_yaml import parse_document, parse_value
from calque.weights import Stored
from tests.calque.artifact_folder import write_proved_artifact

MANY = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SOME = settings(MANY, max_examples=50)

# Pieces that YAML gives a meaning, so that random text is not only ever plain text.
PIECES = st.sampled_from(
    [*"{}[],:&*!|>'\"%@`?-#~<=.\\\t\n", " ", "\n  ", "- ", ": ", "? ", "&a ", "*a", "!!python/name:os.system ", "!!binary ", "!!set ",
     "<<: ", "---\n", "...\n", "%YAML 9.9\n", ".nan", ".inf", "-.inf", "0x", "0o9", "1e999", "1_000", "model", "target", "onnxruntime",
     "dims", "null", "true", "9" * 5000, "\x00", "\x85", "\u2028", "\ufeff", "\ud800", "é", "\U0001d54f", "\x7f"]
)  # fmt: skip
YAML = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=8
)
KEYS = st.sampled_from([field.alias or name for name, field in Recipe.model_fields.items()]) | st.text(max_size=6)


def refusal(kind: type[CalqueError], act: Callable[[], object]) -> str:
    """The error of that kind that the act ends in, as a person reads it; empty if it ends well. Any other error passes."""
    try:
        act()
    except kind as error:
        return str(error)
    return ""


@MANY
@given(text=YAML)
@example("? [a]\n: b")
@example("!!int {}")
@example("a: !!float x")
@example("- " * 3000)
@example("{" * 3000)
@example("!" * 50)
@example("\ud800")
def test_any_text_is_a_document_or_a_recipe_error(text: str) -> None:
    as_document = refusal(RecipeError, lambda: parse_document(text, "the test"))
    as_value = refusal(RecipeError, lambda: parse_value(text))
    assert bool(as_document) == bool(as_value)


@MANY
@given(content=st.binary(max_size=80) | YAML.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_a_recipe_or_a_recipe_error(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(content)
        assert len(refusal(RecipeError, lambda: Recipe.read(path))) < 20_000


@MANY
@given(changes=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_settings_are_a_recipe_or_a_recipe_error(changes: dict[str, Any]) -> None:
    def described() -> str:
        return json.dumps(Recipe.of({"model": "builtin:quill", "target": "onnxruntime", **changes}).as_manifest())

    assert len(refusal(RecipeError, described)) < 20_000


@MANY
@given(changes=st.dictionaries(KEYS, VALUES, max_size=4))
def test_settings_mean_the_same_in_a_file_and_as_flags(changes: dict[str, Any]) -> None:
    settings = {"model": "builtin:quill", "target": "onnxruntime", **changes}

    def outcome(make: Callable[[], Recipe]) -> object:
        try:
            return repr(make())
        except RecipeError:
            return "refused"

    def written() -> Recipe:
        with TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            # JSON is YAML, but for NaN and infinities, which it has no words for.
            path.write_text(json.dumps(settings).replace("-Infinity", "-.inf").replace("Infinity", ".inf").replace("NaN", ".nan"))
            return Recipe.read(path)

    texts = json.dumps(settings)
    if "Infinity" in texts or "NaN" in texts or "\\ud" in texts or "\\u" in texts:
        outcome(written)
        return
    assert outcome(lambda: Recipe.of(settings)) == outcome(written)


# Checkpoints.

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64), "empty": torch.zeros(0, 3)}
REAL = save(TENSORS)


def located(content: bytes) -> dict[str, Stored] | None:
    """What the reader makes of a file, read to the last byte; None if it refuses."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        if said := refusal(SourceUnreadable, lambda: checkpoint.read_headers(Path(folder))):
            assert len(said) < 20_000
            return None
        found = checkpoint.read_headers(Path(folder))
        for stored in found.values():
            assert stored.file == path.resolve()
            assert 8 <= stored.offset <= stored.offset + stored.nbytes <= len(content)
            assert tuple(stored.read().shape) == stored.shape
        return found


@MANY
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_checkpoint_or_unreadable(content: bytes) -> None:
    located(content)


@MANY
@given(header=VALUES, data=st.binary(max_size=32), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_json_header_is_a_checkpoint_or_unreadable(header: Any, data: bytes, length: int | None) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    located((len(text) if length is None else length).to_bytes(8, "little") + text + data)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "BOOL", "F8_E4M3", "I8", "F6", ""]) | VALUES,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | st.lists(st.just(2**63), max_size=80) | VALUES,
        "data_offsets": st.tuples(st.integers(-2, 40), st.integers(-2, 40)) | VALUES,
        "more": VALUES,
    },
)


@MANY
@given(header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRY, max_size=3), data=st.binary(max_size=40))
def test_any_entries_are_a_checkpoint_or_unreadable(header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    located(len(text).to_bytes(8, "little") + text + data)


@MANY
@given(cut=st.integers(0, len(REAL)), flips=st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 7)), max_size=3))
def test_cut_and_flipped_files_are_read_rightly_or_refused(cut: int, flips: list[tuple[int, int]]) -> None:
    content = bytearray(REAL)
    for place, bit in flips:
        content[place] ^= 1 << bit
    found = located(bytes(content[:cut]))
    if cut < len(REAL):
        assert found is None
    header = 8 + int.from_bytes(REAL[:8], "little")
    if cut == len(REAL) and all(place >= header for place, _ in flips):
        assert found is not None
        assert {name: stored.shape for name, stored in found.items()} == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@SOME
@given(table=VALUES | st.dictionaries(st.text(max_size=4), st.text(max_size=12) | st.just("../x.safetensors"), max_size=3))
def test_any_index_stays_within_the_folder_or_is_refused(table: Any) -> None:
    with TemporaryDirectory() as outer:
        folder = Path(outer, "model")
        folder.mkdir()
        Path(outer, "x.safetensors").write_bytes(REAL)
        (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": table}), encoding="utf-8")
        with pytest.raises(SourceUnreadable):
            checkpoint.read_headers(folder)


# Manifests.


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole") / "artifact"
    write_proved_artifact(folder)
    table: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return table


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, inner in items for place in places(inner, (*at, key)))]


def changed(table: Any, place: tuple[Any, ...], value: Any, drop: bool) -> Any:
    """The JSON value with one place replaced, or dropped."""
    if not place:
        return value
    copy = dict(table) if isinstance(table, dict) else list(table)
    if drop and len(place) == 1:
        del copy[place[0]]
    else:
        copy[place[0]] = changed(copy[place[0]], place[1:], value, drop)
    return copy


def read(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    if not refusal(ArtifactUnreadable, lambda: Artifact.read(folder)):
        artifact = Artifact.read(folder)
        artifact.damaged_files()
        json.dumps(artifact.manifest())
    refused = refusal(UsageError, lambda: check_output(folder, force=True))
    assert refused or is_artifact(folder)


@MANY
@given(data=st.data(), value=VALUES, drop=st.booleans())
def test_changed_manifest_is_read_or_refused(manifest: dict[str, Any], data: st.DataObject, value: Any, drop: bool) -> None:
    place = data.draw(st.sampled_from(places(manifest)))
    with TemporaryDirectory() as folder:
        read(Path(folder), json.dumps(changed(manifest, place, value, drop)).encode("utf-8", "surrogatepass"))


@SOME
@given(data=st.data())
def test_damaged_manifest_is_read_or_refused(manifest: dict[str, Any], data: st.DataObject) -> None:
    text = bytearray(json.dumps(manifest).encode())
    for place in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=4)):
        text[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(text)))
    with TemporaryDirectory() as folder:
        read(Path(folder), bytes(text[:cut] if data.draw(st.booleans()) else text))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + "9" * 10_000 + "}", "\ud800", "[]", "null", "{}", '{"schema": 1}'])
def test_hostile_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ArtifactUnreadable):
        Artifact.read(tmp_path)
    assert not is_artifact(tmp_path)
