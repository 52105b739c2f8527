from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file, save_file

from calque import passes, preflight
from calque.conversion import Conversion, open_target
from calque.errors import SourceUnreadable, Unsupported, WeightMismatch
from calque.facts import source_facts
from calque.packing import unpack
from calque.passes.quantize_weights import QuantizeWeights
from calque.pipeline import convert
from calque.recipe import Recipe
from calque.source import ModelSource
from calque.stored_integers import Dequantized, held_group
from calque.traced import TracedModel
from tests import quantized_checkpoints as written
from tests.quantized_checkpoints import FILE, Written
from tests.tiny_models import TYPES, eager_model

Write = Callable[[Path], Written]
UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"

# How it is written, the form that is found, and the scheme in which its integers can be kept.
FORMS: dict[str, tuple[Write, str, str | None]] = {
    "gptq": (written.gptq, "gptq int4-g32", "int4-g32"),
    "gptq-asymmetric": (partial(written.gptq, symmetric=False), "gptq int4-asymmetric-g32", "int4-asymmetric-g32"),
    "gptq-v2": (partial(written.gptq, symmetric=False, version=2), "gptq int4-asymmetric-g32", "int4-asymmetric-g32"),
    "gptq-2-bits": (partial(written.gptq, bits=2, symmetric=False), "gptq int2-asymmetric-g32", "int4-asymmetric-g32"),
    "gptq-3-bits": (partial(written.gptq, bits=3), "gptq int3-g32", "int4-g32"),
    "gptq-8-bits": (partial(written.gptq, bits=8, group=-1), "gptq int8", "int8"),
    "gptq-in-order-of-activations": (partial(written.gptq, permuted=True), "gptq int4-g32 in order of activations", None),
    "awq": (written.awq, "awq int4-asymmetric-g32", "int4-asymmetric-g32"),
    "packed": (written.compressed, "compressed-tensors int4-g32", "int4-g32"),
    "packed-asymmetric": (partial(written.compressed, group=16, symmetric=False), "compressed-tensors int4-asymmetric-g16",
                          "int4-asymmetric-g16"),
    "packed-6-bits": (partial(written.compressed, bits=6), "compressed-tensors int6-g32", "int8-g32"),
    "packed-rows": (partial(written.compressed, group=0), "compressed-tensors int4", "int4"),
    "short-groups": (partial(written.compressed, group=8), "compressed-tensors int4-g8", None),
    "integers": (partial(written.compressed, kind="int-quantized", bits=8, group=0), "compressed-tensors int8", "int8"),
    "bitsandbytes-int8": (written.bitsandbytes_int8, "bitsandbytes int8", "int8"),
    "bitsandbytes-nf4": (written.bitsandbytes_nf4, "bitsandbytes nf4", None),
    "bitsandbytes-nf4-not-nested": (partial(written.bitsandbytes_nf4, nested=False), "bitsandbytes nf4", None),
    "fp8": (written.float8, "fp8 e4m3, one scale a block of 48x32", None),
    "floats": (partial(written.float8, method="compressed-tensors"), "compressed-tensors e4m3, one scale a row", None),
}  # fmt: skip


def source_of(folder: Path) -> ModelSource:
    return ModelSource.resolve(str(folder), scratch=folder)


def edit(folder: Path, add: dict[str, torch.Tensor] | None = None, drop: tuple[str, ...] = ()) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / FILE).items() if name not in drop}
    save_file(tensors | (add or {}), folder / FILE, {"format": "pt"})


def settings(folder: Path, **changes: Any) -> None:
    """The folder's config says something else of the quantization."""
    path = folder / "config.json"
    table = json.loads(path.read_text())
    table["quantization_config"] |= changes
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("form", FORMS)
def test_weights_and_the_reference_are_what_the_packed_numbers_stand_for(form: str, tmp_path: Path) -> None:
    write, said, scheme = FORMS[form]
    expected = write(tmp_path)
    source = source_of(tmp_path)
    loaded = source.load_eager().state_dict()
    assert source.weights.keys() == expected.numbers.keys() == loaded.keys()
    for name, numbers in expected.numbers.items():
        # float32 rounds each product once; LLM.int8's scale is a product itself.
        within = 2e-7 * np.abs(numbers).max() if form == "bitsandbytes-int8" else 0.0
        assert np.abs(source.weights[name].read().float().numpy() - numbers).max() <= within, name
        assert np.abs(loaded[name].numpy() - numbers).max() <= within, name
    weight = source.weights[UP]
    assert isinstance(weight, Dequantized)
    assert weight.form == said
    assert str(weight.scheme) == str(scheme)


@pytest.mark.parametrize("form", [form for form, (_, _, scheme) in FORMS.items() if scheme])
def test_integers_that_can_be_kept_are_those_that_were_packed(form: str, tmp_path: Path) -> None:
    expected = FORMS[form][0](tmp_path)
    weights = source_of(tmp_path).weights
    for name, integers in expected.integers.items():
        weight = weights[name]
        assert isinstance(weight, Dequantized)
        assert weight.integers is not None
        assert np.array_equal(weight.integers().q.numpy(), integers), name


@pytest.mark.parametrize(
    ("index", "size", "group", "held"),
    [(None, 96, 32, 32), (None, 96, 96, 0), (None, 96, 48, 16), (None, 96, 8, None), (None, 1024, 512, 256), (None, 80, 32, 16),
     ([0] * 16 + [1] * 32 + [0] * 16, 64, 32, 16), ([0, 1] * 16, 32, 16, None), ([0] * 64, 64, 32, 0)],
)  # fmt: skip
def test_integers_are_held_in_the_longest_groups_that_share_a_scale(index: list[int] | None, size: int, group: int, held: int) -> None:
    assert held_group(None if index is None else torch.tensor(index), size, group) == held


def untouched(folder: Path) -> TracedModel:
    recipe = Recipe(model=str(folder), target="onnxruntime")
    return Conversion(recipe, open_target(recipe), source_of(folder)).trace()


def traced(folder: Path, **options: Any) -> TracedModel:
    model = untouched(folder)
    passes.run([QuantizeWeights(**options)], model)
    return model


def fates(model: TracedModel) -> dict[str, str]:
    return {name: fate.split(",")[0] for name, (_, fate) in model.quantized.items()}


def test_integers_are_kept_where_the_bits_are_those_asked_for(tmp_path: Path) -> None:
    expected = written.gptq(tmp_path, group=16)
    model = traced(tmp_path, bits=4, group=32)
    assert set(fates(model).values()) == {"kept exactly"}
    assert fates(model).keys() == expected.integers.keys()
    for name, integers in expected.integers.items():
        assert np.array_equal(model.weights[f"{name}.q"].read().numpy(), integers)
        assert model.weights[f"{name}.scale"].shape == (integers.shape[0], integers.shape[1] // 16)
        assert np.array_equal(model.replaced[name].read().numpy(), expected.numbers[name])
    assert f"{HEAD}.q" in model.weights, "a head that is stored as numbers is quantized as any"


@pytest.mark.parametrize(
    ("options", "fate"),
    [
        ({"bits": 8, "group": 0}, "dequantized and quantized anew as int8"),
        pytest.param({"bits": 4, "group": 16, "stored": "none"}, "dequantized and quantized anew as int4-g16", marks=pytest.mark.slow),
        ({"bits": 4, "stored": "symmetric"}, "dequantized and quantized anew as int4-g32"),
        pytest.param({"bits": 4, "overrides": {"*": "int8"}}, "dequantized and quantized anew as int8-g32", marks=pytest.mark.slow),
        ({"bits": 4, "overrides": {"*": "keep"}}, "dequantized"),
    ],
)
def test_integers_are_made_anew_where_others_are_asked_for(options: dict[str, Any], fate: str, tmp_path: Path) -> None:
    written.awq(tmp_path)
    assert set(fates(traced(tmp_path, **options)).values()) == {fate}


@pytest.mark.slow
def test_head_in_4_bits_is_not_widened_unless_it_is_named(tmp_path: Path) -> None:
    written.gptq(tmp_path, head=True)
    assert fates(traced(tmp_path, bits=4))[HEAD] == "kept exactly"
    assert fates(traced(tmp_path, bits=4, overrides={HEAD: "int8"}))[HEAD] == "dequantized and quantized anew as int8-g32"
    assert fates(traced(tmp_path, bits=8, group=0))[HEAD] == "dequantized and quantized anew as int8"


def in_the_file(folder: Path) -> dict[str, tuple[Any, Any, Any]]:
    """Return signed integers, scales and signed zero points of each product in model.onnx, by the name of its first weight."""
    model = onnx.load(folder / "model.onnx")
    held = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            scale = held[node.input[2]]
            zero = torch.from_numpy(held[node.input[3]].copy()) if len(node.input) > 3 and node.input[3] else None
            zeros = None if zero is None else unpack(zero, sizes["bits"], scale.reshape(sizes["N"], -1).shape[1]).numpy()
            q = unpack(torch.from_numpy(held[node.input[1]].copy()), sizes["bits"], sizes["K"]).numpy()
            found[node.input[1].split(".weight.")[0] + ".weight"] = (q, scale.reshape(sizes["N"], -1), zeros)
    return found


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_int4_artifact_holds_the_integers_of_the_checkpoint_and_is_proved(method: str, tmp_path: Path) -> None:
    expected: Written = getattr(written, method)(tmp_path / method)
    artifact = convert(Recipe(model=str(tmp_path / method), target="onnxruntime", precision="int4"), tmp_path / "out")
    assert artifact.proof.numerics.status == "passed"
    products = in_the_file(tmp_path / "out")
    for name, (q, scale, zeros) in products.items():
        if name == HEAD:
            continue
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"] if "q_proj" in name else [name]
        assert np.array_equal(q, np.concatenate([expected.integers[part] for part in parts])), name
        grouped = (q.astype(np.float64) - (0 if zeros is None else zeros.repeat(32, 1))) * scale.astype(np.float64).repeat(32, 1)
        assert np.array_equal(grouped.astype(np.float32), np.concatenate([expected.numbers[part] for part in parts])), name
        assert (zeros is None) is (method == "gptq")
    assert len(products) == 11
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [note for note in report["notes"] if method in note] == [
        f"Weights that the checkpoint holds as {FORMS[method][1]}: 14 (model.layers.0.self_attn.q_proj.weight, "
        "model.layers.0.self_attn.k_proj.weight, …) kept exactly, integers and scales are the checkpoint's own."
    ]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("precision", "fate"),
    [
        ("int8", "dequantized and quantized anew as int8, which loses a second time"),
        ("fp32", "dequantized, the artifact holds numbers"),
        ("fp16", "dequantized, the artifact holds numbers"),
    ],
)
def test_other_precisions_are_proved_and_the_report_says_what_became_of_the_integers(precision: Any, fate: str, tmp_path: Path) -> None:
    written.gptq(tmp_path / "model", permuted=True)
    convert(Recipe(model=str(tmp_path / "model"), target="onnxruntime", precision=precision), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    [note] = [note for note in report["notes"] if "gptq" in note]
    assert note.endswith(f"{fate}.")
    assert report["source"]["dtype"] == "float16, gptq int4-g32 in order of activations"


def test_quantized_experts_are_merged_as_numbers(tmp_path: Path) -> None:
    written.float8(tmp_path, tiny=TYPES["mixtral"])
    model = untouched(tmp_path)
    merged = [name for name in model.quantized if name.endswith("experts.gate_up_proj")]
    assert len(merged) == 2
    loaded = source_of(tmp_path).load_eager()
    assert torch.equal(model.weights[merged[0]].read(), loaded.get_parameter(merged[0]))
    assert {form for form, _ in model.quantized.values()} == {FORMS["fp8"][1]}


def test_sizes_are_those_of_the_numbers(tmp_path: Path) -> None:
    written.awq(tmp_path)
    source = source_of(tmp_path)
    plain = sum(parameter.numel() for parameter in eager_model(written.LLAMA).parameters())
    assert sum(int(np.prod(weight.shape)) for weight in source.weights.values()) == plain
    preflight.require_tensors(source)
    assert source_facts(source, {}, plain)["dtype"] == "float16, awq int4-asymmetric-g32"


@pytest.mark.parametrize("form", ["gptq", "awq", "packed", "integers", "bitsandbytes-int8", "bitsandbytes-nf4", "fp8"])
def test_every_tensor_of_a_weight_that_is_missing_is_named(form: str, tmp_path: Path) -> None:
    FORMS[form][0](tmp_path)
    module = UP.removesuffix(".weight")
    parts = [name for name in load_file(tmp_path / FILE) if name.startswith(f"{module}.")]
    needed = [name for name in parts if not name.endswith(("g_idx", "input_scale", "weight_format", "nested_absmax", "nested_quant_map"))]
    for missing in needed:
        kept = load_file(tmp_path / FILE)
        edit(tmp_path, drop=(missing,))
        with pytest.raises(SourceUnreadable) as caught:
            _ = source_of(tmp_path).weights
        assert any(line.startswith((missing.split("bitsandbytes__")[0], f"{UP}  ")) for line in caught.value.where), missing
        save_file(kept, tmp_path / FILE, {"format": "pt"})


def test_tensors_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    written.awq(tmp_path)
    module = UP.removesuffix(".weight")
    edit(tmp_path, {f"{module}.scales": torch.ones(3, 128, dtype=torch.float16)})
    with pytest.raises(SourceUnreadable, match="do not fit together") as caught:
        _ = source_of(tmp_path).weights
    assert caught.value.where[0].startswith(f"{module}  qweight I32 [64, 16]")


def test_tensor_of_a_quantized_checkpoint_without_a_use_is_listed(tmp_path: Path) -> None:
    written.gptq(tmp_path)
    edit(tmp_path, {"model.layers.0.mlp.act.scales": torch.ones(128)})
    with pytest.raises(SourceUnreadable) as caught:
        traced(tmp_path)
    assert any(line.startswith("model.layers.0.mlp.act.qweight") for line in caught.value.where)
    edit(tmp_path, {"adapter.down": torch.ones(2, 2)}, drop=("model.layers.0.mlp.act.scales",))
    with pytest.raises(WeightMismatch, match=r"adapter\.down"):
        traced(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant_method": "hqq"}, "is quantized by hqq"),
        ({"quant_method": "mxfp4"}, "is quantized by mxfp4"),
        ({"quant_method": None}, "a method it does not name"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "version: gemv"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format: nvfp4-pack-quantized"),
    ],
)
def test_method_that_cannot_be_read_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    written.gptq(tmp_path)
    settings(tmp_path, **changes)
    with pytest.raises(Unsupported) as caught:
        source_of(tmp_path)
    assert said in str(caught.value)
    assert caught.value.exit_code == 4


def test_random_weights_of_a_quantized_model_are_plain(tmp_path: Path) -> None:
    written.gptq(tmp_path / "model")
    settings(tmp_path / "model", quant_method="hqq")
    source = ModelSource.resolve(str(tmp_path / "model"), random_weights=True, scratch=tmp_path / "scratch")
    assert source.quantization is None
    assert source.weights is source.tensors


def test_zero_points_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    written.gptq(tmp_path, symmetric=False)
    settings(tmp_path, sym=True)
    with pytest.raises(SourceUnreadable, match="says sym: true"):
        source_of(tmp_path).weights[UP].read()


def test_weights_that_a_model_holds_the_other_way_round_are_refused(tmp_path: Path) -> None:
    expected = written.float8(tmp_path, tiny=TYPES["gpt2"], products=(".c_attn.weight", ".c_fc.weight"))
    assert len(expected.integers) == 0
    with pytest.raises(Unsupported, match="the other way round") as caught:
        traced(tmp_path)
    assert len(caught.value.where) == 4
