from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from calque.converters import causal_lm, encoder
from calque.errors import TargetUnavailable, Unsupported, UsageError
from calque.passes.cache_static import CacheStatic
from calque.passes.cast_precision import CastPrecision
from calque.passes.fuse_gelu import FuseGelu
from calque.passes.fuse_layer_norm import FuseLayerNorm
from calque.passes.fuse_rms_norm import FuseRmsNorm
from calque.passes.fuse_rotary import FuseRotary
from calque.passes.simplify_shapes import SimplifyShapes
from calque.passes.transpose_linear import TransposeLinear
from calque.source import ModelSource
from calque.targets import _torch_tensorrt
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from tests.tiny_encoders import VOCABULARY, save_encoder
from tests.tiny_models import source_of, traced

if TYPE_CHECKING:
    from torch.export import ExportedProgram

SLOTS = 16
SHAPES = {
    "input_ids": {"min": [1, 1], "opt": [1, 4], "max": [2, SLOTS]},
    "position_ids": {"min": [1, 1], "opt": [1, 4], "max": [2, SLOTS]},
    "write_indices": {"min": [1], "opt": [1], "max": [2]},
    "kv_lengths": {"min": [1], "opt": [1], "max": [2]},
}


def rewritten(tiny: str) -> TracedModel:
    # Traced anew: what other tests do to a shared trace, its symbols remember.
    model = causal_lm.trace(source_of(tiny))
    for each in (FuseRmsNorm(), FuseRotary(), CacheStatic(SLOTS), SimplifyShapes(), TransposeLinear()):
        each.apply(model)
    model.finish_rewrite()
    return model


def with_states(model: TracedModel) -> dict[str, Any]:
    return SHAPES | {
        state.input: {end: [rows, *state.shape[1:]] for end, rows in (("min", 1), ("opt", 1), ("max", 2))} for state in model.states
    }


def agree(program: ExportedProgram, model: TracedModel, feeds: dict[str, Any]) -> None:
    """The decomposed program gives what the graph gives."""
    expected = TracedSession(model)("model", feeds)
    with torch.no_grad():
        given = program.module()(*(torch.from_numpy(feeds[spec.name]) for spec in model.inputs))
    for spec, value in zip(model.outputs, given, strict=True):
        assert np.abs(value.numpy() - np.asarray(expected[spec.name], np.float32)).max() < 1e-5


def operators(program: ExportedProgram) -> set[str]:
    """The operators that are not ATen's."""
    named = [node.target for node in program.graph.nodes if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)]
    return {str(target) for target in named if target.namespace != "aten"}


def slots(model: TracedModel, rows: int, new: int, begin: int) -> dict[str, Any]:
    """A call whose rows begin at other slots, over states that hold something."""
    draw = np.random.default_rng(7)
    starts = np.arange(rows) + begin
    feeds: dict[str, Any] = {
        "input_ids": draw.integers(3, 200, (rows, new)),
        "position_ids": starts[:, None] + np.arange(new),
        "write_indices": starts,
        "kv_lengths": (starts + new).astype(np.int32),
    }
    for state in model.states:
        feeds[state.input] = draw.standard_normal((rows, *(int(size) for size in state.shape[1:])), dtype=np.float32)
    return feeds


@pytest.mark.parametrize("tiny", ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gemma2", "gpt2"))])
def test_a_decoder_is_aten_but_for_its_slots_and_gives_the_same(tiny: str) -> None:
    model = rewritten(tiny)
    before = [str(node.target) for node in model.graph.nodes]
    program = _torch_tensorrt.decomposed(model)
    assert operators(program) == {"calque.write_slots.default"}
    agree(program, model, slots(model, rows=2, new=5, begin=0))
    agree(program, model, slots(model, rows=3, new=1, begin=9))
    assert [str(node.target) for node in model.graph.nodes] == before, "the model itself stays as it was"
    assert all(hasattr(value, "fake_mode") for value in model.program.parameters())


@pytest.mark.slow
def test_narrow_weights_stay_narrow() -> None:
    model = rewritten("llama")
    CastPrecision("float16").apply(model)
    model.finish_rewrite()
    program = _torch_tensorrt.decomposed(model)
    assert operators(program) == {"calque.write_slots.default"}
    assert {value.dtype for value in program.parameters()} == {torch.float16}


def test_an_encoder_is_aten_and_gives_the_same(tmp_path: Path) -> None:
    model = encoder.trace(ModelSource.resolve(str(save_encoder(tmp_path / "bert", "bert", num_hidden_layers=1)), scratch=tmp_path))
    for each in (FuseGelu(), FuseLayerNorm(), SimplifyShapes()):
        each.apply(model)
    model.finish_rewrite()
    program = _torch_tensorrt.decomposed(model)
    assert operators(program) == set()
    sums = [node for node in program.graph.nodes if node.target is torch.ops.aten.cumsum.default]
    assert {node.meta["val"].dtype for node in sums} == {torch.float32}, "of whole numbers it would be said to be whole and be none"
    ids = np.random.default_rng(3).integers(3, VOCABULARY, (2, 6))
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    agree(program, model, {spec.name: feeds[spec.name] for spec in model.inputs})


def test_missing_package_is_told_with_the_line_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(TargetUnavailable, match=r"torch-tensorrt is not installed\nFix: .*pip install 'torch-tensorrt>=2.14'"):
        _torch_tensorrt.require()
    with pytest.raises(TargetUnavailable):
        _torch_tensorrt.build(traced("llama"), tmp_path / "model.plan", SHAPES)


class Package:
    """What stands where torch-tensorrt would: it notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.converters: dict[Any, Any] = {}
        self.layers: list[Any] = []
        self.error: Exception | None = None

    def convert(
        self,
        program: Any,
        *,
        arg_inputs: Any,
        arg_input_binding_names: Any = None,
        output_binding_names: Any = None,
        **options: Any,
    ) -> bytes:
        if self.error:
            logging.getLogger("torch_tensorrt [TensorRT Conversion Context]").error("Error Code 4: heads differ")
            logging.getLogger("elsewhere").error("of others")
            raise self.error
        self.calls.append((program, {"inputs": arg_inputs, "names": (arg_input_binding_names, output_binding_names), **options}))
        return b"engine"

    def converter(self, target: Any, **options: Any) -> Any:
        return lambda function: self.converters.__setitem__(target, (function, options))

    def layer(self, *arguments: Any) -> Any:
        self.layers.append(arguments)
        return None if hasattr(arguments[2], "computed") else "whole"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    stand_in = Package()
    root = "torch_tensorrt"
    parts: dict[str, dict[str, Any]] = {
        root: {"Input": SimpleNamespace, "__spec__": importlib.machinery.ModuleSpec(root, None)},
        f"{root}.dynamo": {"convert_exported_program_to_serialized_trt_engine": stand_in.convert},
        f"{root}.dynamo.conversion": {"dynamo_tensorrt_converter": stand_in.converter},
        f"{root}.dynamo.conversion.converter_utils": {"cast_trt_tensor": lambda ctx, value, dtype, name: (value, dtype)},
        f"{root}.dynamo.conversion.impl": {},
        f"{root}.dynamo.conversion.impl.slice_scatter": {"emit_kv_cache_update_layer": stand_in.layer},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_torch_tensorrt, "decomposed", lambda model: model.program)
    _torch_tensorrt._register_slots.cache_clear()
    yield stand_in
    _torch_tensorrt._register_slots.cache_clear()


def test_the_engine_has_the_names_and_ranges_of_the_artifact(package: Package, tmp_path: Path) -> None:
    model = rewritten("llama")
    _torch_tensorrt.build(model, tmp_path / "model.plan", with_states(model))
    assert (tmp_path / "model.plan").read_bytes() == b"engine"
    [(_, said)] = package.calls
    assert said["names"] == (tuple(spec.name for spec in model.inputs), tuple(spec.name for spec in model.outputs))
    ids = said["inputs"][0]
    assert (ids.min_shape, ids.opt_shape, ids.max_shape, ids.dtype) == ((1, 1), (1, 4), (2, SLOTS), torch.int64)
    assert said["inputs"][3].dtype == torch.int32
    assert not said["attn_bias_is_causal"]


def test_slots_become_the_layer_that_writes_in_place(package: Package, tmp_path: Path) -> None:
    model = rewritten("llama")
    _torch_tensorrt.build(model, tmp_path / "model.plan", with_states(model))
    [(target, (function, options))] = package.converters.items()
    assert (target, options) == (torch.ops.calque.write_slots.default, {"supports_dynamic_shapes": True})
    shuffle = SimpleNamespace(get_output=lambda place: "apart")
    network = SimpleNamespace(add_shuffle=lambda new: shuffle)
    ctx, past, computed = (
        SimpleNamespace(net=network),
        SimpleNamespace(shape=(-1, 2, SLOTS, 24)),
        SimpleNamespace(shape=(1, 2, 8, 24), computed=1),
    )
    assert function(ctx, target, (past, "new", "starts"), {}, "w") == "whole"
    assert shuffle.reshape_dims == (0, 2, 0, 24)
    assert package.layers == [(ctx, "w", past, "apart", ("starts", torch.int32))]
    with pytest.raises(RuntimeError, match="not an input as it stands"):
        function(ctx, target, (computed, "new", "starts"), {}, "w")


def test_an_input_of_changing_shape_needs_a_range(package: Package, tmp_path: Path) -> None:
    model = rewritten("llama")
    with pytest.raises(UsageError, match=r"no range\n  past_key_values.0.key"):
        _torch_tensorrt.build(model, tmp_path / "model.plan", SHAPES)


def test_a_refused_graph_is_unsupported_and_leaves_no_engine(package: Package, tmp_path: Path) -> None:
    package.error = RuntimeError("While interpreting the module got an error: aten.foo")
    model = rewritten("llama")
    handlers = [*logging.getLogger().handlers]
    with pytest.raises(Unsupported) as caught:
        _torch_tensorrt.build(model, tmp_path / "model.plan", with_states(model))
    assert caught.value.where == ("Error Code 4: heads differ", "While interpreting the module got an error: aten.foo")
    assert logging.getLogger().handlers == handlers
    assert not (tmp_path / "model.plan").exists()


def test_a_release_that_names_tensors_itself_is_refused(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def older(program: Any, *, arg_inputs: Any = None) -> bytes:
        return b""

    monkeypatch.setattr(sys.modules["torch_tensorrt.dynamo"], "convert_exported_program_to_serialized_trt_engine", older)
    with pytest.raises(TargetUnavailable, match="names of its own"):
        _torch_tensorrt.require()


def test_a_package_that_cannot_be_loaded_is_told(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["torch_tensorrt.dynamo"], "convert_exported_program_to_serialized_trt_engine")
    with pytest.raises(TargetUnavailable, match=r"cannot be loaded\n  ImportError"):
        _torch_tensorrt.require()


def test_a_machine_without_a_gpu_is_told(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetUnavailable, match="torch finds none"):
        _torch_tensorrt.require()
