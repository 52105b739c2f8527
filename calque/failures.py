"""Failures that libraries raise in their own words, told in ours."""

from __future__ import annotations

from calque.console import size
from calque.errors import CalqueError, TargetUnavailable, WontFit
from calque.memory import asked_for, ran_out

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
            return _not_installed(name, command)
    if ran_out(error):
        asked = asked_for(error)
        what = f"memory ran out: {size(asked)} in one piece could not be had" if asked else "memory ran out"
        return WontFit(what, fix="close other programs, or convert on a machine with more memory")
    return None


def _not_installed(name: str, command: str) -> TargetUnavailable:
    """Return the error that names the module that was looked for, and with it whatever else is missing."""
    from calque.doctor import INSTALL_CONVERT, missing_for_convert

    missing = missing_for_convert()
    if name not in [package.replace("-", "_") for package in missing]:
        missing = [name, *missing]
    are = "is" if len(missing) == 1 else "are"
    return TargetUnavailable(f"calque {command} needs {', '.join(missing)}, which {are} not installed", fix=INSTALL_CONVERT)
