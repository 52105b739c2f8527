"""Faults of the emitted file: each an edit of ``model.onnx`` or ``model.onnx.data`` in a copy of the artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calque import passes, targets
from calque.artifact import Artifact
from calque.session import Session
from tests.mutations.traced_gate import traced_gate

FILE = "model.onnx"
TARGET = "onnxruntime"

Edit = Callable[[Path], None]


@cache
def artifact(name: str) -> Artifact:
    """The model converted for real, without the companions that nobody reads here."""
    gate = traced_gate(name)
    target = targets.make(TARGET, {"operators": "standard"})  # whose inputs and attributes these faults are in
    model = gate.traced.copy()
    counts = passes.run(target.passes("fp32"), model)
    folder = gate.folder / TARGET
    folder.mkdir()
    emitted = target.emit(target.lower(model), model, folder)
    return Artifact(folder, TARGET, {}, {}, "fp32", {}, emitted.graphs, model.states, counts, {}, emitted.limits)


def opened(whole: Artifact) -> Session:
    """A session of ONNX Runtime over the artifact, on one thread."""
    from calque.runtime.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(whole, threads=1)


def broken(whole: Artifact, edit: Edit) -> Artifact:
    """A copy of the artifact with the fault in it."""
    folder = whole.folder.with_name(edit.__name__)
    shutil.copytree(whole.folder, folder)
    edit(folder)
    return replace(whole, folder=folder)


def attentions(model: ir.Model) -> list[ir.Node]:
    """The attention of each layer, in order."""
    return [node for node in model.graph if node.op_type == "Attention"]


def output_weights(model: ir.Model) -> list[ir.Value]:
    """The output projection of each layer's attention."""
    endings = ("o_proj.weight", "o_proj.weight.transposed", "attn.c_proj.weight")
    return [value for name, value in sorted(model.graph.initializers.items()) if name.endswith(endings)]


def edit_attention(folder: Path, change: Callable[[ir.Node], None]) -> None:
    """The attention of layer 1 is changed; weights stay where they are."""
    model = ir.load(folder / FILE)
    change(attentions(model)[1])
    ir.save(model, folder / FILE)


def initializers_swapped(folder: Path) -> None:
    """The output projections of layers 0 and 1 stand under each other's names."""
    model = ir.load(folder / FILE)
    one, other, *_ = output_weights(model)
    one.const_value, other.const_value = other.const_value, one.const_value
    for value in (one, other):
        assert value.const_value is not None
        value.const_value.name = value.name
    ir.save(model, folder / FILE)


def one_weight_perturbed(folder: Path) -> None:
    """One element, the largest, of one matrix in ``model.onnx.data`` is 1 % off."""
    weight = output_weights(ir.load(folder / FILE))[1].const_value
    assert isinstance(weight, ir.ExternalTensor)
    data = np.memmap(folder / str(weight.location), dtype=np.float32, mode="r+", offset=weight.offset or 0, shape=(weight.size,))
    data[np.abs(data).argmax()] *= np.float32(1.01)
    data.flush()


def keys_turned(folder: Path) -> None:
    """The last layer's key projection lies in ``model.onnx.data`` with its columns one further."""
    initializers = ir.load(folder / FILE).graph.initializers
    weight = [value for name, value in sorted(initializers.items()) if "k_proj.weight" in name][-1].const_value
    assert isinstance(weight, ir.ExternalTensor)
    data = np.memmap(
        folder / str(weight.location), dtype=np.float32, mode="r+", offset=weight.offset or 0, shape=tuple(weight.shape.numpy())
    )
    data[:] = np.roll(data, 1, axis=1)
    data.flush()


def scale_missing(folder: Path) -> None:
    """``scale`` of layer 1's Attention is 1."""

    def change(node: ir.Node) -> None:
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)

    edit_attention(folder, change)


def softcap_dropped_or_invented(folder: Path) -> None:
    """``softcap`` of layer 1's Attention is 0 where the model has one, 50 where it has none."""

    def change(node: ir.Node) -> None:
        cap = node.attributes["softcap"].as_float()
        node.attributes["softcap"] = ir.AttrFloat32("softcap", 0.0 if cap else 50.0)

    edit_attention(folder, change)


def mask_input_dropped(folder: Path) -> None:
    """Layer 1's Attention has no mask."""
    edit_attention(folder, lambda node: node.replace_input_with(3, None))


def keys_and_values_swapped(folder: Path) -> None:
    """Layer 1's Attention has keys and values in each other's place."""

    def change(node: ir.Node) -> None:
        key, value = node.inputs[1:3]
        node.replace_input_with(1, value)
        node.replace_input_with(2, key)

    edit_attention(folder, change)


def presents_swapped(folder: Path) -> None:
    """The keys of layers 0 and 1 go out under each other's names."""
    model = ir.load(folder / FILE)
    one, other = (value for value in model.graph.outputs if value.name in ("present.0.key", "present.1.key"))
    one.name, other.name, one.name = "swapping", one.name, other.name
    ir.save(model, folder / FILE)


def past_behind_new(folder: Path) -> None:
    """Layer 1's cache puts what is new ahead of the past."""
    model = ir.load(folder / FILE)
    for output in model.graph.outputs:
        if output.name in ("present.1.key", "present.1.value"):
            joined = output.producer()
            assert joined is not None
            past, new = joined.inputs
            joined.replace_input_with(0, new)
            joined.replace_input_with(1, past)
    ir.save(model, folder / FILE)


EDITS: tuple[Edit, ...] = (
    initializers_swapped,
    one_weight_perturbed,
    scale_missing,
    softcap_dropped_or_invented,
    mask_input_dropped,
    keys_and_values_swapped,
    presents_swapped,
    past_behind_new,
)
