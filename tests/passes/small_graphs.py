"""Small torch modules traced as a model is, for the forms of a pattern that no tiny model has, and for what nearly is one."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, export

from calque import checkpoint, passes
from calque.artifact import Limits, TensorSpec
from calque.converters.tidy import tidy
from calque.passes import Pass
from calque.states import StateSpec
from calque.traced import TracedModel
from calque.weights import WeightTable

_FOLDER = Path(tempfile.mkdtemp(prefix="small-graphs-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_NUMBERS = itertools.count()


def small(module: nn.Module, inputs: dict[str, Tensor], axes: dict[str, dict[int, str]], states: tuple[StateSpec, ...] = ()) -> TracedModel:
    """The trace of a module; ``axes`` names what varies of an input, its batch where it says nothing. Parameters lie in a file."""
    module = module.eval().requires_grad_(False)
    file = _FOLDER / str(next(_NUMBERS)) / "model.safetensors"
    file.parent.mkdir()
    parameters = dict(module.named_parameters())
    save_file({name: tensor.contiguous() for name, tensor in parameters.items()} or {"none": Tensor([0.0])}, file)
    stored = checkpoint.read_headers(file.parent)
    named = {name: axes.get(name, {0: "batch"}) for name in inputs}
    dims = {dim: Dim(dim, max=64) for given in named.values() for dim in given.values() if "+" not in dim}
    dynamic: list[Any] = [{axis: dims.get(dim, Dim.AUTO) for axis, dim in named[name].items()} for name in inputs]
    if states:
        # They come last, as one argument.
        dynamic[-len(states) :] = [tuple(dynamic[-len(states) :])]
    program = export(module, tuple(inputs.values()), dynamic_shapes=tuple(dynamic), strict=False)
    required = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    outputs = tuple(
        TensorSpec(f"out{i or ''}", "float32", tuple(f"out{i}_{axis}" for axis in range(node.meta["val"].dim())))
        for i, node in enumerate(next(iter(reversed(program.graph.nodes))).args[0])
    )
    model = TracedModel(
        program=program,
        weights=WeightTable({name: stored[name] for name in required}, required, available=tuple(stored), origin="a small graph"),
        states=states,
        inputs=tuple(
            TensorSpec(name, str(x.dtype).removeprefix("torch."), tuple(named[name].get(i, size) for i, size in enumerate(x.shape)))
            for name, x in inputs.items()
        ),
        outputs=outputs,
        limits=Limits(),
        settled=not states,
    )
    tidy(model)
    model.drop_unused_parameters()
    model.finish_rewrite()
    return model


def arrays(inputs: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The same inputs as a session takes them."""
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def left_alone(pass_: Pass, model: TracedModel) -> set[str]:
    """The pass changes nothing, and these are the reasons that it gives."""
    code = str(model.graph)
    done = passes.run_one(pass_, model)
    assert done.count == 0
    assert str(model.graph) == code
    return {reason for _, reason in done.skipped}
