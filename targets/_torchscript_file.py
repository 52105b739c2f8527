"""A module in TorchScript made of its lines and its weights, and written as a file that says what it is and is held against that."""

from __future__ import annotations

import json
import os
import re
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calque.artifact import Artifact, TensorSpec
from calque.console import size
from calque.errors import Unsupported
from calque.runtime.torchscript_session import quiet
from calque.targets import _torchscript
from calque.targets._aten import tensors
from calque.targets._mobile_operators import operators, runtime_version
from calque.targets._torchscript import Writer
from calque.targets._torchscript_integers import by_rows, packed_weight, packing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calque.traced import TracedModel

# The file in the file that says what calls look like.
METADATA = "calque.json"
STORAGES = re.compile(r"/(constants|data)/[^/]+$")
# Scales of packed weights are float64, their zero points int64.
PACKED_ROW_BYTES = 16
# What the lines of a node take, and where they come from: 1 kB was measured.
NODE_BYTES = 2_000
# What else may be stored: numbers that follow of weights, and a little of everything.
SPARE, SPARE_BYTES = 1.02, 16_384
# How long the calls are that a mobile file brings along.
EXAMPLE_SIZES = {"batch_size": 1, "past_sequence_length": 0}
EXAMPLE_LENGTH = 4


def module(written: Writer, model: TracedModel) -> torch.jit.ScriptModule:
    """Return the frozen module; every weight is read."""
    real = tensors(model)
    values = {node: real[name] for node in written.program.graph.nodes if (name := written.held.get(node.name)) is not None}
    with quiet(), packing():
        by_rows(written, values)
        return _torchscript.frozen(written, values)


def save(written: Writer, model: TracedModel, path: Path) -> None:
    """Write the module that torch loads.

    Raises:
        Unsupported: its weights would be in the file more than once.
    """
    made = module(written, model)
    with quiet(), packing():
        reserve(path, written, model)
        made.save(str(path), _extra_files={METADATA: described(written, model)})
    require_once(path, written, model)


def save_lite(written: Writer, model: TracedModel, path: Path, bytecode: int) -> None:
    """Write the module that the lite interpreter loads, in so old a version of its bytecode.

    Raises:
        Unsupported: its weights would be in the file more than once; phones have not an operator of it, or their runtime reads
            no such bytecode.
    """
    from torch.jit.mobile import _backport_for_mobile, _get_model_bytecode_version

    written.methods.append(examples(model.inputs))
    made = module(written, model)
    newest = path.with_name(path.name + ".newest")
    with quiet(), packing():
        reserve(newest, written, model)
        made._save_for_lite_interpreter(str(newest), _extra_files={METADATA: described(written, model)})
        if _get_model_bytecode_version(str(newest)) == bytecode:
            newest.rename(path)
        else:
            if not _backport_for_mobile(str(newest), str(path), bytecode):  # type: ignore[no-untyped-call]
                raise Unsupported(f"torch cannot write bytecode {bytecode} of this model", fix="leave --set bytecode out")
            newest.unlink()
        if (found := _get_model_bytecode_version(str(path))) != bytecode:
            raise Unsupported(f"{path.name} has bytecode {found}, {bytecode} is wanted", fix="leave --set bytecode out")
    require_once(path, written, model)
    require_operators(path)


def reserve(path: Path, written: Writer, model: TracedModel) -> None:
    """There is room for the file: torch, which writes it anew, would end the process where it cannot grow.

    By way of a buffer, which cannot fail so, it would take three times the file's size of memory.

    Raises:
        OSError: there is not.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # neither on macOS nor on Windows
            os.posix_fallocate(file.fileno(), 0, tensor_bytes(written, model) + NODE_BYTES * len(written.program.graph.nodes))


def tensor_bytes(written: Writer, model: TracedModel) -> int:
    """Return how many bytes the tensors of a file take, each once."""
    rows = sum(int(held.parts[1].meta["val"].shape[0]) for held in written.attributes.values() if held.make is packed_weight)
    constants = sum(model.constant(name).nbytes for name in model.constants().values())
    return model.weights.nbytes() + constants + PACKED_ROW_BYTES * rows


def require_once(path: Path, written: Writer, model: TracedModel) -> None:
    """Leave quietly if the tensors in a file take no more than the weights do.

    Raises:
        Unsupported: they do, as those of weights that another engine than qnnpack packed.
    """
    with zipfile.ZipFile(path) as file:
        stored = sum(entry.file_size for entry in file.infolist() if STORAGES.search(entry.filename))
    expected = tensor_bytes(written, model)
    if stored > SPARE * expected + SPARE_BYTES:
        raise Unsupported(
            f"{path.name} holds {size(stored)} of tensors, the weights take {size(expected)}: some of them are in it more than once",
            fix="report this with the model's name; nothing was written",
        )


def require_operators(path: Path) -> None:
    """Leave quietly if the runtime of phones has every operator that a file's bytecode calls.

    Raises:
        Unsupported: those that it has not.
    """
    from torch.jit.mobile import _get_model_ops_and_info

    with quiet():
        called = _get_model_ops_and_info(str(path))  # type: ignore[no-untyped-call]
    lines = [
        f"{name}  {'with ' + str(info.num_schema_args) + ' arguments' if name in operators() else 'is not there'}"
        for name, info in called.items()
        if name not in operators() or (info.num_schema_args or 0) > len(operators()[name])
    ]
    if lines:
        raise Unsupported(f"PyTorch Mobile {runtime_version()} cannot run {path.name}", lines, "use another target")


def described(written: Writer, model: TracedModel) -> str:
    """Return what a file says of itself, as JSON: inputs and outputs in the order of calls, states, and where its integers are."""
    weights = {held.weight: name for name, held in written.attributes.items() if held.make is packed_weight}
    tables = {held.weight: name for name, held in written.attributes.items() if held.weight and held.weight not in weights}
    return json.dumps(
        {
            "schema": 1,
            "inputs": [asdict(spec) for spec in model.inputs],
            "outputs": [asdict(spec) for spec in model.outputs],
            "states": [asdict(state) for state in model.states],
            "limits": asdict(model.limits),
            "packed": weights,
            "tables": tables,
        },
        indent=1,
    )


def examples(inputs: tuple[TensorSpec, ...]) -> str:
    """Return the methods by which tools of PyTorch Mobile find calls in a file: one, of a row of few tokens and no past."""
    made = []
    for spec in inputs:
        sizes = [part if isinstance(part, int) else EXAMPLE_SIZES.get(part, EXAMPLE_LENGTH) for part in spec.shape]
        dtype = f"dtype=torch.{spec.dtype}"
        if spec.name == "position_ids":
            made.append(f"torch.arange({sizes[-1]}, {dtype}).expand({sizes})")
        else:
            made.append(f"torch.{'ones' if spec.dtype == 'int64' else 'zeros'}({sizes}, {dtype})")
    return f"def get_all_bundled_inputs(self):\n    return [({', '.join(made)},)]\ndef get_num_bundled_inputs(self):\n    return 1\n"


def integers(artifact: Artifact) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the integers int8 [out, in] and the scales float32 [out, 1] of every weight that a file holds packed, by its name."""
    import torch

    path = artifact.folder / next(iter(artifact.graphs.values())).file
    extra = {METADATA: ""}
    with quiet(), packing():
        loaded: Any = torch.jit.load(str(path), _extra_files=extra)  # type: ignore[no-untyped-call]
        packed = {name: getattr(loaded, held) for name, held in json.loads(extra[METADATA])["packed"].items()}
        unpacked = {name: torch.ops.quantized.linear_unpack(held)[0] for name, held in packed.items()}
        return {name: (weight.int_repr(), weight.q_per_channel_scales().float()[:, None]) for name, weight in unpacked.items()}
