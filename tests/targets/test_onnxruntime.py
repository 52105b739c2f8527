from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from calque import passes
from calque.artifact import Limits
from calque.converters import causal_lm
from calque.errors import RecipeError
from calque.source import ModelSource
from calque.targets import Emitted, deciding_passes, load, make, names
from calque.targets.onnxruntime import DATA, FILE, OnnxRuntime
from tests.tiny_models import VOCABULARY, source_of, traced

TYPES_OF = {"int64": onnx.TensorProto.INT64, "float32": onnx.TensorProto.FLOAT}


def emitted(name: str, folder: Path, *first: passes.Pass, operators: Any = "fused") -> tuple[onnx.ModelProto, Emitted]:
    model, target = traced(name), OnnxRuntime(operators)
    passes.run([*first, *target.passes("fp32")], model)
    assert target.problems(model) == []
    made = target.emit(target.lower(model), model, folder)
    return onnx.load(folder / FILE, load_external_data=False), made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, Emitted, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return (*emitted("llama", folder), folder)


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_are_those_of_the_contract_in_order(llama: Any) -> None:
    inputs = {value.name: shape_of(value) for value in llama[0].graph.input}
    states = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *states]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 24]


def test_outputs_are_those_of_the_contract_in_order(llama: Any) -> None:
    outputs = {value.name: shape_of(value) for value in llama[0].graph.output}
    assert list(outputs) == ["logits", *(f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value"))]
    assert outputs["logits"] == ["batch_size", "sequence_length", VOCABULARY]
    assert outputs["present.0.key"] == ["batch_size", 2, "total_sequence_length", 24]


def test_described_graph_is_the_one_in_the_file(llama: Any) -> None:
    model, made, _ = llama
    spec = made.graphs["model"]
    for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        assert [(v.name, v.type.tensor_type.elem_type, tuple(shape_of(v))) for v in values] == [
            (s.name, TYPES_OF[s.dtype], s.shape) for s in specs
        ]
    assert made.limits == Limits(padding="any", batched_chunk=False)


@pytest.mark.parametrize("keep", ["last", "dynamic"])
def test_cut_logits_are_named_by_what_is_kept(keep: str, tmp_path: Path) -> None:
    model, _ = emitted("llama", tmp_path, passes.load("keep_last_logits", {"keep": keep}))
    logits = shape_of(model.graph.output[0])
    assert logits == ["batch_size", 1 if keep == "last" else "num_logits_to_keep", VOCABULARY]
    last = model.graph.input[-1]
    assert (last.name == "num_logits_to_keep") == (keep == "dynamic")
    assert keep == "last" or shape_of(last) == []


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_only_standard_operators_of_one_opset_are_used_where_they_are_asked_for(name: str, tmp_path: Path) -> None:
    model, made = emitted(name, tmp_path, operators="standard")
    assert made.limits == Limits(padding="any", batched_chunk=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    onnx.checker.check_model(str(tmp_path / FILE))


def test_model_carries_no_path_and_no_metadata(llama: Any) -> None:
    model, _, folder = llama
    data = (folder / FILE).read_bytes()
    assert not model.metadata_props
    assert not model.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    for path in (folder, Path.cwd(), Path(sys.prefix), Path.home()):
        assert str(path).encode() not in data
    assert b".py" not in data
    places = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert places == {DATA}


def test_weights_lie_outside_the_graph_once_each(llama: Any) -> None:
    model, _, folder = llama
    weights = traced("llama").weights.nbytes()
    # Vectors of a few hundred bytes stay in the graph.
    inside = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert inside < 4096
    assert weights <= inside + (folder / DATA).stat().st_size <= weights + 4096
    assert (folder / FILE).stat().st_size < 60_000


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_tied_weight_is_stored_once(name: str, tmp_path: Path) -> None:
    model, _ = emitted(name, tmp_path)
    assert source_of(name).config.tie_word_embeddings
    shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
    assert shapes.count((VOCABULARY, 64)) == 1
    assert (64, VOCABULARY) not in shapes
    assert (tmp_path / DATA).stat().st_size <= traced(name).weights.nbytes() + 4096


def test_two_emissions_give_the_same_bytes(llama: Any, tmp_path: Path) -> None:
    emitted("llama", tmp_path)
    for name in (FILE, DATA):
        assert (tmp_path / name).read_bytes() == (llama[2] / name).read_bytes()


def test_target_is_found_by_its_name_and_checks_its_options() -> None:
    assert "onnxruntime" in names()
    assert load("onnxruntime") is OnnxRuntime
    assert make("onnxruntime", {"operators": "fused", "padding": "any"}) == OnnxRuntime()
    with pytest.raises(RecipeError, match="cannot take these options") as caught:
        make("onnxruntime", {"operators": "banana"})
    assert "standard" in caught.value.where[0]


@pytest.mark.parametrize("padding", ["right", "none"])
def test_padding_of_fused_operators_is_refused_with_standard_ones(padding: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make("onnxruntime", {"operators": "standard", "padding": padding})
    assert caught.value.where == (f"padding: {padding} belongs to operators: fused; standard ones take padding anywhere",)


# A sparse file stands for 300 MB of weights: what is measured is what emission holds, not what it reads.
STREAMED = textwrap.dedent("""
    import json, math, sys
    from pathlib import Path
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig
    from calque import passes
    from calque.converters import causal_lm
    from calque.random_weights import CAUSAL, _header, _outline, _tensors
    from calque.source import ModelSource
    from calque.stages import Stages
    from calque.targets.onnxruntime import OnnxRuntime

    def resident():
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024

    folder = Path(sys.argv[1])
    config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=16,
                         num_key_value_heads=8)
    config.save_pretrained(folder)
    tensors = _tensors(_outline(config, 0, CAUSAL, False))
    header = _header(tensors)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()))
    del tensors
    model, target, stages = causal_lm.trace(ModelSource.resolve(str(folder), scratch=folder)), OnnxRuntime(), Stages(lambda _: None)
    passes.run(target.passes("fp32"), model)
    before = resident()
    with stages("lower"):
        lowered = target.lower(model)
    ready = resident()
    with stages("emit"):
        target.emit(lowered, model, folder)
    print(json.dumps([before, ready, *(stage.peak_rss_bytes for stage in stages.done), (folder / "model.onnx.data").stat().st_size]))
""")


def test_memory_stays_far_below_the_weights_while_they_stream_through(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", STREAMED, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, ready, lower, emit, size = json.loads(done.stdout.splitlines()[-1])
    assert size > 290e6
    assert emit - ready < 120e6
    # Lowering loads the exporter's own code, and no weight.
    assert lower - before < size / 2


def test_options_that_decide_the_passes_are_named() -> None:
    options = {"cache": "static", "operators": "fused", "arithmetic": "float32"}
    assert deciding_passes("onnxruntime", options, "fp32") == ["options: cache: static"]
    assert deciding_passes("onnxruntime", options, "fp16") == ["options: cache: static", "options: arithmetic: float32"]
    assert deciding_passes("onnxruntime", {"operators": "fused", "padding": "right"}, "fp32") == ["options: padding: right"]


def nodes_of_a_step(layers: int, folder: Path) -> int:
    """The nodes of a Qwen2 whose biases are zeros, as transformers initializes them; the peers counted beside it leave these out too."""
    config: Any = Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    model, target = causal_lm.trace(ModelSource.resolve(str(folder), scratch=folder)), OnnxRuntime(padding="right")
    passes.run(target.passes("fp32"), model)
    return len(list(target.lower(model).graph))


def test_a_step_of_24_layers_of_qwen2_has_no_more_than_250_nodes(tmp_path: Path) -> None:
    two, three = (nodes_of_a_step(layers, tmp_path / str(layers)) for layers in (2, 3))
    assert two + 22 * (three - two) <= 250
