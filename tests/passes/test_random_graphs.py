"""What must hold for every pass and every lowering, on random small graphs and random lengths."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calque import passes
from calque.artifact import NUM_LOGITS_TO_KEEP
from calque.errors import Unsupported
from calque.passes import Pass
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.drop_zero_bias import DropZeroBias
from calque.passes.fuse_gelu import FuseGelu
from calque.passes.fuse_layer_norm import FuseLayerNorm
from calque.passes.fuse_residual_norm import FuseResidualNorm
from calque.passes.fuse_rms_norm import FuseRmsNorm
from calque.passes.fuse_rotary import FuseRotary
from calque.passes.keep_last_logits import KeepLastLogits
from calque.passes.merge_gate_up import MergeGateUp
from calque.passes.pool_sentences import PoolSentences
from calque.passes.simplify_shapes import SimplifyShapes
from calque.passes.transpose_linear import TransposeLinear
from calque.targets._to_onnx import to_onnx
from calque.traced import TracedModel
from calque.traced_session import TracedSession
from tests.passes.random_models import SHAPES, Shape, feeds, trace

# What two orders of the same float32 sums may differ by, in units of an output's largest value.
ROUNDING = 2e-5
PASSES: list[Pass] = [
    CacheDynamic(), DropZeroBias(), FuseGelu(), FuseLayerNorm(), FuseResidualNorm(), FuseRmsNorm(), FuseRotary(), KeepLastLogits("last"),
    KeepLastLogits("dynamic"), MergeGateUp(), SimplifyShapes(), TransposeLinear(),
]  # fmt: skip
LENGTHS = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 4))
FEW = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
Arrays = dict[str, NDArray[Any]]


def run(model: TracedModel, inputs: Arrays) -> Arrays:
    return dict(TracedSession(model)("model", inputs))


def picture(model: TracedModel) -> tuple[Any, ...]:
    """Everything that a rewrite can change."""
    signature = model.program.graph_signature
    return (
        str(model.graph), str(signature), model.inputs, model.outputs, model.settled, dict(model.weights.entries),
        sorted(model.program.state_dict), len(model.program.module_call_graph),
    )  # fmt: skip


def assert_close(expected: Arrays, got: Arrays) -> None:
    assert expected.keys() <= got.keys()
    for name, wanted in expected.items():
        found = got[name]
        wanted = wanted[:, wanted.shape[1] - found.shape[1] :] if name == "logits" else wanted
        assert wanted.shape == found.shape, name
        assert np.abs(wanted - found).max(initial=0) <= ROUNDING * max(1.0, np.abs(wanted).max(initial=0)), name


def asked(model: TracedModel, inputs: Arrays, keep: int) -> Arrays:
    wanted = any(spec.name == NUM_LOGITS_TO_KEEP for spec in model.inputs)
    return {**inputs, NUM_LOGITS_TO_KEEP: np.array(keep)} if wanted else inputs


@FEW
@given(shape=SHAPES, lengths=LENGTHS, keep=st.integers(0, 6), plan=st.lists(st.sampled_from(PASSES), min_size=1, max_size=4))
def test_passes_keep_outputs_signature_ledger_and_the_original(
    shape: Shape, lengths: tuple[int, int, int], keep: int, plan: list[Pass]
) -> None:
    cuts = any(isinstance(step, KeepLastLogits) for step in plan)
    assume(not cuts or any(block.state for block in shape.blocks))
    assume(keep <= lengths[1])
    original = trace(shape)
    original.weights.check()
    inputs, before = feeds(original, shape, *lengths), picture(original)
    expected = run(original, inputs)
    model = original.copy()
    assert picture(model) == before
    for step in plan:
        passes.run_one(step, model)
        model.graph.lint()
        model.program.validate()  # type: ignore[no-untyped-call]
        assert list(model.placeholders()) == [spec.name for spec in model.inputs]
        assert len(model.output_node().args[0]) == len(model.outputs)  # type: ignore[arg-type]
        assert set(model.parameters()) == set(model.weights.entries)
        assert_close(expected, run(model, asked(model, inputs, keep)))
        after = picture(model)
        assert passes.run_one(step, model).count == 0
        assert picture(model) == after
    assert model.weights.nbytes() == original.weights.nbytes()
    # Rewriting the copy must not show through.
    assert picture(original) == before
    assert_close(expected, run(original, inputs))


@FEW
@given(shape=SHAPES, pooling=st.sampled_from([PoolSentences(), PoolSentences("max", False)]))
def test_pass_that_refuses_leaves_the_graph_as_it_was(shape: Shape, pooling: PoolSentences) -> None:
    model = trace(shape)
    before = picture(model)
    with pytest.raises(Unsupported, match="last_hidden_state"):
        passes.run_one(pooling, model)
    assert picture(model) == before


@FEW
@given(shape=SHAPES, lengths=LENGTHS, keep=st.integers(0, 6), transposed=st.booleans(), cut=st.booleans())
def test_lowered_graph_gives_what_the_traced_one_gives(
    shape: Shape, lengths: tuple[int, int, int], keep: int, transposed: bool, cut: bool
) -> None:
    assume(keep <= lengths[1])
    assume(not cut or any(block.state for block in shape.blocks))
    plan: list[Pass] = [CacheDynamic()]
    plan += [TransposeLinear()] if transposed else []
    plan += [KeepLastLogits("dynamic")] if cut else []
    model = trace(shape)
    passes.run(plan, model)
    inputs = asked(model, feeds(model, shape, *lengths), keep)
    expected = run(model, inputs)
    lowered = to_onnx(model)
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        ir.save(lowered, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [spec.name for spec in model.inputs]
    got = dict(zip((spec.name for spec in model.outputs), session.run(None, inputs), strict=True))
    assert_close(expected, got)
