"""Failures that libraries raise in their own words, told in ours."""

from __future__ import annotations

from calque.errors import CalqueError, TargetUnavailable, WontFit
from calque.memory import ran_out

# What `import` calls the packages of calque[convert].
CONVERT_MODULES = frozenset(
    {
        "huggingface_hub",
        "ml_dtypes",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "optimum",
        "pydantic",
        "requests",
        "safetensors",
        "torch",
        "transformers",
    }
)


def explained(error: Exception, command: str) -> CalqueError | None:
    """Return what a library's error means for ``calque {command}``; None where nobody expected it."""
    if isinstance(error, CalqueError) and not ran_out(error):  # a source that cannot be read for want of memory is not broken
        return error
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").split(".")[0]
        if name in CONVERT_MODULES:
            fix = "pip install 'calque[convert]'; `calque doctor` lists what is missing"
            return TargetUnavailable(f"calque {command} needs {name}, which is not installed", fix=fix)
    if ran_out(error):
        return WontFit("memory ran out", fix="close other programs, or convert on a machine with more memory")
    return None
