from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import AutoConfig

from calque import targets
from calque.artifact import Artifact, Limits
from calque.errors import Unsupported
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.resume import differences
from calque.runtime import open_session
from calque.targets import _genai
from calque.validation.report import Report
from tests.ecosystem.decoders import END, PADDING, save_decoder
from tests.tiny_encoders import save_encoder

pytestmark = pytest.mark.usefixtures("shared_traces")  # tracing is not what is tested here


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder("gemma3_text", tmp_path_factory.mktemp("model"))


def converted(model: Path, out: Path, **settings: Any) -> Artifact:
    return convert(Recipe.of({"model": str(model), "target": "onnxruntime", "parity": {"scenarios": ["length-1"]}, **settings}), out)


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return converted(model, tmp_path_factory.mktemp("out") / "out")


def test_genai_config_says_what_the_graph_and_the_config_say(artifact: Artifact) -> None:
    told = json.loads((artifact.folder / _genai.FILE).read_text())
    assert _genai.FILE in artifact.files
    decoder = told["model"].pop("decoder")
    assert told["model"] == {
        "bos_token_id": 1, "context_length": 128, "eos_token_id": END, "pad_token_id": PADDING, "type": "gemma3_text", "vocab_size": 211,
    }  # fmt: skip
    assert told["search"]["max_length"] == 128
    assert told["search"]["past_present_share_buffer"] is False
    [graph] = artifact.graphs.values()
    layers = range(decoder["num_hidden_layers"])
    fed, given = decoder["inputs"], decoder["outputs"]
    assert (decoder["filename"], decoder["head_size"], decoder["num_key_value_heads"], decoder["num_attention_heads"]) == (
        graph.file,
        24,
        2,
        4,
    )
    pasts = [fed[f"past_{kind}_names"] % layer for layer in layers for kind in ("key", "value")]
    assert [fed["input_ids"], fed["attention_mask"], fed["position_ids"], *pasts] == [spec.name for spec in graph.inputs]
    presents = [given[f"present_{kind}_names"] % layer for layer in layers for kind in ("key", "value")]
    assert [given["logits"], *presents] == [spec.name for spec in graph.outputs]


def test_same_recipe_gives_the_same_genai_config(artifact: Artifact, model: Path, tmp_path: Path) -> None:
    again = converted(model, tmp_path / "again")
    assert again.files == artifact.files


@pytest.mark.parametrize(
    ("settings", "limits", "changed", "reason"),
    [
        ({}, Limits(), {"model_type": "gpt2"}, "it does not know models of type gpt2"),
        ({"logits": "last"}, Limits(), {}, "logits last"),
        ({}, Limits(padding="none"), {}, "which this model cannot be given"),
        ({}, Limits(), {"eos_token_id": None}, "names an end token"),
    ],
)
def test_no_genai_config_is_written_where_genai_would_be_wrong(
    settings: dict[str, Any], limits: Limits, changed: dict[str, Any], reason: str, artifact: Artifact, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(artifact.folder)
    for name, value in changed.items():
        setattr(config, name, value)
    [note] = _genai.write(replace(artifact, folder=tmp_path, recipe={**artifact.recipe, **settings}, limits=limits), config)
    assert reason in note
    assert not (tmp_path / _genai.FILE).exists()


def test_cache_with_gaps_or_with_heads_of_several_sizes_gets_no_genai_config(artifact: Artifact, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(artifact.folder)
    first, second, *rest = artifact.states
    gaps = replace(artifact, folder=tmp_path, states=tuple(rest))
    sizes = replace(artifact, folder=tmp_path, states=(replace(first, shape=(*first.shape[:3], 32)), second, *rest))
    convolution = replace(artifact, folder=tmp_path, states=(replace(first, kind="conv"), second, *rest))
    notes = [_genai.write(changed, config)[0] for changed in (gaps, sizes, convolution)]
    assert ["no keys and values of their own" in notes[0], "differ in heads" in notes[1], "besides keys and values" in notes[2]] == [
        True
    ] * 3


def test_context_ends_where_the_cache_would_have_to_be_recomputed(artifact: Artifact, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(artifact.folder)
    [note] = _genai.write(replace(artifact, folder=tmp_path, limits=Limits(recompute_at=32)), config)
    assert "at 32 tokens" in note
    assert json.loads((tmp_path / _genai.FILE).read_text())["model"]["context_length"] == 32


def test_report_says_why_there_is_no_genai_config(tmp_path: Path) -> None:
    artifact = convert(Recipe(model="builtin:quill", target="onnxruntime", logits="dynamic"), tmp_path / "out")
    assert not (artifact.folder / _genai.FILE).exists()
    assert [note for note in Report.read(artifact.folder).notes if "num_logits_to_keep" in note]


def test_layout_of_transformers_js_names_files_as_it_looks_for_them(model: Path, artifact: Artifact, tmp_path: Path) -> None:
    arranged = converted(model, tmp_path / "out", layout="transformers.js")
    assert arranged.graphs["model"].file == "onnx/model.onnx"
    assert {name for name in arranged.files if name.startswith("onnx/")} == {"onnx/model.onnx", "onnx/model.onnx_data"}
    assert not list(arranged.folder.glob("*.onnx*"))
    config = json.loads((arranged.folder / "config.json").read_text())
    assert config.pop("transformers.js_config") == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert config == json.loads((artifact.folder / "config.json").read_text())
    graph = onnx.load(arranged.folder / "onnx/model.onnx", load_external_data=False)
    places = {entry.value for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert places == {"model.onnx_data"}
    assert arranged.files["onnx/model.onnx_data"] == artifact.files["model.onnx.data"]
    assert arranged.recipe["layout"] == "transformers.js"
    assert json.loads((arranged.folder / _genai.FILE).read_text())["model"]["decoder"]["filename"] == "onnx/model.onnx"
    assert callable(open_session(arranged.folder))


def test_arranged_artifact_need_not_be_converted_again(model: Path, tmp_path: Path) -> None:
    settings = {"model": str(model), "target": "onnxruntime", "parity": {"scenarios": ["length-1"]}, "layout": "transformers.js"}
    convert(Recipe.of(settings), tmp_path / "out")
    assert differences(Recipe.of(settings), tmp_path / "out") == []
    [reason] = differences(Recipe.of({**settings, "layout": "flat"}), tmp_path / "out")
    assert reason == "recipe: layout was 'transformers.js', is 'flat'"


def test_precision_names_the_file_of_transformers_js(artifact: Artifact, tmp_path: Path) -> None:
    from calque.targets._transformers_js import arrange

    for precision, name in (("fp16", "model_fp16.onnx"), ("int8", "model_int8.onnx"), ("int4", "model_q4.onnx")):
        folder = tmp_path / precision
        folder.mkdir()
        for file in ("model.onnx", "config.json", "model.onnx.data"):
            (folder / file).write_bytes((artifact.folder / file).read_bytes())
        arranged = arrange(replace(artifact, folder=folder, precision=precision), "model.onnx.data")
        assert arranged.graphs["model"].file == f"onnx/{name}"
        assert sorted(path.name for path in (folder / "onnx").iterdir()) == [name, f"{name}_data"]


def test_encoder_takes_either_layout_and_gets_no_genai_config_nor_a_note(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "model", "bert", architectures=["BertModel"])
    arranged = convert(Recipe(model=str(model), target="onnxruntime", layout="transformers.js"), tmp_path / "out")
    assert "onnx/model.onnx_data" in arranged.files
    assert _genai.FILE not in arranged.files
    assert not [note for note in Report.read(arranged.folder).notes if "genai" in note]


def test_layout_that_the_precision_has_no_name_for_is_refused(tmp_path: Path) -> None:
    target = targets.make("onnxruntime", {})
    assert [targets.layouts(target, precision) for precision in ("int4", "bf16")] == [("flat", "transformers.js"), ("flat",)]
    with pytest.raises(Unsupported) as caught:
        convert(Recipe(model="builtin:quill", target="onnxruntime", precision="fp8", layout="transformers.js"), tmp_path / "out")
    assert any(line.startswith("layout: transformers.js  onnxruntime in fp8 has flat") for line in caught.value.where)
