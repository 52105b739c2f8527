"""Run by the packages that quantize, in an environment of their own: quantizes a folder, and writes down what they say it stands for.

Argument, JSON: ``model``, a float checkpoint; ``folder``, for the quantized one; ``method``; ``options``. Leaves the numbers, as the
packages' own code has them, in ``folder/expected.pt``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "model.safetensors"
Packed = tuple[dict[str, Tensor], Tensor]


def is_product(name: str) -> bool:
    return name.endswith("_proj.weight")


def package(name: str) -> Path:
    """Return where a package lies; importing it whole would want packages that are not needed here."""
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def steps(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scales and unsigned zero points [out, groups], of whole ranges."""
    parts = weight.reshape(weight.shape[0], -1, group if group > 0 else weight.shape[1])
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    if symmetric:
        middle = 1 << (bits - 1)
        return torch.maximum(high, -low) / (middle - 1), torch.full_like(low, middle)
    scale = ((high - low) / ((1 << bits) - 1)).half().float()
    return scale, (-low / scale).round()


def auto_gptq(weight: Tensor, bits: int, group: int, symmetric: bool) -> Packed:
    path = package("auto_gptq") / "nn_modules" / "qlinear" / "qlinear_cuda_old.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda_old", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    made = module.QuantLinear(bits, group, weight.shape[1], weight.shape[0], False, weight_dtype=torch.float32)
    made.pack(linear, *steps(weight, bits, group, symmetric), None)
    return made.state_dict(), made(torch.eye(weight.shape[1])).t()


def auto_awq(weight: Tensor, group: int) -> Packed:
    if "awq" not in sys.modules:
        stub = types.ModuleType("awq")
        stub.__path__ = [str(package("awq"))]
        sys.modules["awq"] = stub
    dequantize_gemm = import_module("awq.utils.packing_utils").dequantize_gemm
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    scales, zeros = (part.t().contiguous() for part in steps(weight, 4, group, False))
    made = import_module("awq.modules.linear.gemm").WQLinear_GEMM.from_linear(linear, 4, group, False, scales, zeros)
    return made.state_dict(), dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).t()


def by_layer(folder: Path, settings: dict[str, Any], pack: Any, **options: Any) -> dict[str, Tensor]:
    """Write what ``pack`` makes of each product; return what all weights stand for."""
    tensors, expected = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(folder / FILE).items():
        if not is_product(name):
            tensors[name] = expected[name] = weight
            continue
        parts, expected[name] = pack(weight, **options)
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"quantization_config": settings}))
    return expected


def bitsandbytes(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    wanted: Any = BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]
    AutoModelForCausalLM.from_pretrained(model, quantization_config=wanted, **given).save_pretrained(folder)
    read: Any = AutoModelForCausalLM.from_pretrained(folder, **given)
    return dict(read.dequantize(torch.float32).state_dict())


def compressed_tensors(model: Path, folder: Path, form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    theirs: Any = import_module("compressed_tensors.quantization")
    calculate_qparams = import_module("compressed_tensors.quantization.utils").calculate_qparams
    compressors: Any = import_module("compressed_tensors.compressors")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    activations = theirs.QuantizationArgs(**inputs) if inputs else None
    scheme = theirs.QuantizationScheme(targets=["Linear"], weights=theirs.QuantizationArgs(**weights), input_activations=activations)
    given = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"], "format": form, "quantization_status": "frozen"}
    theirs.apply_quantization_config(loaded, theirs.QuantizationConfig(**given))
    for module in loaded.modules():
        if hasattr(module, "quantization_scheme"):
            weight = module.weight.data
            parts = weight.reshape(weight.shape[0], -1, weights.get("group_size", weight.shape[1]))
            low, high = (weight.amin(), weight.amax()) if weights["strategy"] == "tensor" else (parts.amin(-1), parts.amax(-1))
            scale, zero = calculate_qparams(low, high, module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    compressor = compressors.ModelCompressor.from_pretrained_model(loaded, quantization_format=form)
    compressor.compress_model(loaded)
    loaded.save_pretrained(folder)
    compressor.update_config(folder)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    return dict(read.state_dict())


def fp8(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def main() -> None:
    asked = json.loads(sys.argv[1])
    model, folder, method, options = Path(asked["model"]), Path(asked["folder"]), asked["method"], asked["options"]
    if method in ("gptq", "awq", "fp8"):
        shutil.copytree(model, folder)
    if method == "gptq":
        settings = {"quant_method": "gptq", "bits": options["bits"], "group_size": options["group"], "sym": options["symmetric"]}
        expected = by_layer(folder, settings | {"desc_act": False}, auto_gptq, **options)
    elif method == "awq":
        settings = {"quant_method": "awq", "bits": 4, "group_size": options["group"], "zero_point": True, "version": "gemm"}
        expected = by_layer(folder, settings, auto_awq, **options)
    elif method == "fp8":
        expected = fp8(folder)
    else:
        by_model: Any = {"bitsandbytes": bitsandbytes, "compressed-tensors": compressed_tensors}[method]
        expected = by_model(model, folder, **options)
    torch.save({name: tensor.detach().float().clone() for name, tensor in expected.items()}, folder / "expected.pt")
    print(json.dumps(sorted(expected)))


if __name__ == "__main__":
    main()
