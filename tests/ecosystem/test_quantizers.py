"""Checkpoints that the quantizers' own packages wrote: `python -m pytest -m ecosystem tests/ecosystem/test_quantizers.py`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from calque.pipeline import convert
from calque.recipe import Recipe
from calque.source import ModelSource
from calque.stored_integers import Dequantized
from tests import quantized_checkpoints
from tests.ecosystem import peers

pytestmark = pytest.mark.ecosystem

PACKAGES = ("auto-gptq==0.7.1", "autoawq==0.2.9", "bitsandbytes==0.50.2", "compressed-tensors==0.20.0", "accelerate==1.15.0",
            "psutil==7.2.2", "loguru==0.7.3")  # fmt: skip
PROGRAM = Path(__file__).with_name("quantizers.py")
TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
ROWS = {"num_bits": 8, "strategy": "channel", "symmetric": True}
WHOLE = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"}
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
PACKED, PLAIN, FLOATS = "pack-quantized", "int-quantized", "float-quantized"

# Method, its options, the form that is found, and the precision that can keep it.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gptq": ("gptq", {"bits": 4, "group": 32, "symmetric": True}, "gptq int4-g32", "int4"),
    "gptq-asymmetric": ("gptq", {"bits": 4, "group": 32, "symmetric": False}, "gptq int4-asymmetric-g32", "int4"),
    "gptq-3-bits": ("gptq", {"bits": 3, "group": 32, "symmetric": False}, "gptq int3-asymmetric-g32", "int4"),
    "gptq-8-bits": ("gptq", {"bits": 8, "group": -1, "symmetric": True}, "gptq int8", "int8"),
    "awq": ("awq", {"group": 32}, "awq int4-asymmetric-g32", "int4"),
    "bitsandbytes-nf4": ("bitsandbytes", NF4, "bitsandbytes nf4", ""),
    "bitsandbytes-fp4": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4", ""),
    "bitsandbytes-int8": ("bitsandbytes", {"load_in_8bit": True}, "bitsandbytes int8", "int8"),
    "packed": ("compressed-tensors", {"form": PACKED, "weights": {**GROUPS, "symmetric": True}, "inputs": None},
               "compressed-tensors int4-g32", "int4"),
    "packed-asymmetric": ("compressed-tensors", {"form": PACKED, "weights": {**GROUPS, "symmetric": False}, "inputs": None},
                          "compressed-tensors int4-asymmetric-g32", "int4"),
    "integers": ("compressed-tensors", {"form": PLAIN, "weights": {**ROWS, "type": "int"}, "inputs": {**TOKENS, "type": "int"}},
                 "compressed-tensors int8", "int8"),
    "floats-of-a-tensor": ("compressed-tensors", {"form": FLOATS, "weights": WHOLE, "inputs": {**TOKENS, "type": "float"}},
                           "compressed-tensors e4m3, one scale a tensor", ""),
    "floats": ("compressed-tensors", {"form": FLOATS, "weights": {**ROWS, "type": "float"}, "inputs": {**TOKENS, "type": "float"}},
               "compressed-tensors e4m3, one scale a row", ""),
    "fp8": ("fp8", {}, "fp8 e4m3, one scale a block of 32x32", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return peers.environment("quantizers", PACKAGES, beside_ours=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the packages that quantize cannot be installed here: {error}")


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_stands_for_the_numbers_that_its_own_package_reads(case: str, python: Path, tmp_path: Path) -> None:
    method, options, form, precision = CASES[case]
    model, folder = tmp_path / "model", tmp_path / "quantized"
    if method == "fp8":  # transformers writes such files on a GPU alone; it reads them anywhere
        quantized_checkpoints.float8(model, block=(32, 32))
    else:
        quantized_checkpoints.base(model)
    asked = {"model": str(model), "folder": str(folder), "method": method, "options": options}
    names = peers.run([python], str(PROGRAM), asked, tmp_path)

    source = ModelSource.resolve(str(folder), scratch=tmp_path)
    assert sorted(source.weights) == names
    expected = torch.load(folder / "expected.pt")
    for name, numbers in expected.items():
        # bitsandbytes multiplies an int8 weight by its row's largest value first, so the last bit may differ.
        within = 2e-7 * numbers.abs().max().item() if case == "bitsandbytes-int8" else 0.0
        assert (source.weights[name].read().float() - numbers).abs().max().item() <= within, name
    assert {weight.form for weight in source.weights.values() if isinstance(weight, Dequantized)} == {form}

    (folder / "expected.pt").unlink()
    convert(Recipe(model=str(folder), target="onnxruntime", precision=precision or "int4"), tmp_path / "out")  # type: ignore[arg-type]
    [note] = [note for note in json.loads((tmp_path / "out" / "report.json").read_text())["notes"] if form in note]
    assert "14 (" in note
    assert ("kept exactly" in note) is bool(precision)
