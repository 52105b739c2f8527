"""Files for phones in the lite interpreter of torch 2.1.0: `python -m pytest -m ecosystem tests/ecosystem/test_mobile.py`.

``CALQUE_TORCH_210`` names the Python of its environment, which is not made here, as it takes 4.7 GB:
`python3.11 -m venv env; env/bin/pip install torch==2.1.0 'numpy<2'`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from calque import passes
from calque.targets import _torchscript_prepack
from calque.targets.torchscript_lite import FILE, PREPACKED, TorchScriptLite
from tests.tiny_models import answers, prompt, traced

pytestmark = pytest.mark.ecosystem
SCRIPT = Path(_torchscript_prepack.__file__).with_name("torchscript_package") / "run_lite.py"


@pytest.fixture(scope="module")
def python() -> str:
    given = os.environ.get("CALQUE_TORCH_210")
    if not given:
        pytest.skip("CALQUE_TORCH_210 names no Python of an environment with torch 2.1.0")
    return given


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "bloom", "gpt_oss"])
def test_the_runtime_of_phones_gives_what_the_graph_gives(python: str, name: str, precision: str, tmp_path: Path) -> None:
    model = traced(name)
    target = TorchScriptLite()
    passes.run(target.passes(precision), model)
    target.emit(target.lower(model), model, tmp_path)
    calls = [prompt(model, length) for length in (5, 1)]
    tensors = [[torch.from_numpy(np.ascontiguousarray(call[spec.name])) for spec in model.inputs] for call in calls]
    torch.save(tensors, tmp_path / "in.pt")
    command = [python, "-I", str(SCRIPT), *(str(tmp_path / file) for file in (FILE, "in.pt", "out.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2.1.0")
    for call, found in zip(calls, torch.load(tmp_path / "out.pt"), strict=True):
        np.testing.assert_allclose(found[0].numpy(), answers(model, call)["logits"], atol=0.5 if precision == "int8" else 1e-4)


def test_weights_are_laid_out_for_xnnpack(python: str, tmp_path: Path) -> None:
    model = traced("llama")
    target = TorchScriptLite()
    passes.run(target.passes("fp32"), model)
    target.emit(target.lower(model), model, tmp_path)
    said = _torchscript_prepack.prepack(python, tmp_path / FILE, tmp_path / PREPACKED)
    assert "torch 2.1.0" in said
    assert (tmp_path / PREPACKED).stat().st_size < (tmp_path / FILE).stat().st_size + 50_000
