"""Sessions over small modules: one result or several, and no word of deprecation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calque.artifact import Artifact, GraphSpec, Limits, TensorSpec
from calque.runtime.torchscript_session import LiteSession, TorchScriptSession, quiet

X = TensorSpec("x", "float32", ("batch_size", 2))


@pytest.mark.parametrize("returned", ["x * 2", "(x * 2, x + 1)"])
@pytest.mark.parametrize("session", [TorchScriptSession, LiteSession])
def test_results_come_by_name(returned: str, session: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with quiet():
        module: Any = torch.jit.script(type(f"Small{len(returned)}{session.__name__}", (torch.nn.Module,), {"__module__": "small"})())
        module.define(f"def forward(self, x: Tensor):\n    return {returned}\n")
        module._save_for_lite_interpreter(str(path))
    outputs = tuple(TensorSpec(name, "float32", X.shape) for name in ("twice", "more")[: 2 if "," in returned else 1])
    artifact = Artifact(tmp_path, "torchscript", {}, {}, "fp32", {}, {"model": GraphSpec(path.name, (X,), outputs)}, (), {}, {}, Limits())
    found = session(artifact, threads=1)("model", {"x": np.ones((3, 2), np.float32)})
    assert {name: value.tolist() for name, value in found.items()}.keys() == {spec.name for spec in outputs}
    assert found["twice"].tolist() == [[2, 2]] * 3
