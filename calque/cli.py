"""The commands `calque` and `convert`: parse, call, print; every failure becomes its exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from calque.arguments import parse
from calque.commands import HANDLERS, print_json
from calque.errors import INTERRUPTED, CalqueError, TargetUnavailable, WontFit
from calque.staging import terminations_as_interrupts

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `calque` and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json, verbose = "--json" in arguments, bool({"-v", "--verbose"} & set(arguments))
    try:
        with terminations_as_interrupts():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except CalqueError as error:
        return _report(error, as_json, verbose)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if as_json:
            _print_error(_error_object("Interrupted", INTERRUPTED, "interrupted", (), "run it again"))
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left, as `| head` does. Python would complain once more while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CalqueError.exit_code
    except Exception as error:
        return _report_unexpected(error, as_json, verbose)


def convert_main() -> int:
    """Run `convert`, which is `calque convert`."""
    return main(["convert", *sys.argv[1:]])


def _run(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    try:
        with warnings.catch_warnings():
            if not args.verbose and not sys.warnoptions:
                # Libraries warn their callers; a user of the command can do nothing about it.
                warnings.simplefilter("ignore")
            return HANDLERS[args.command](args)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in CONVERT_MODULES:
            raise
        fix = "pip install 'calque[convert]'; `calque doctor` lists what is missing"
        raise TargetUnavailable(f"calque {args.command} needs {name}, which is not installed", fix=fix) from error
    except MemoryError as error:
        raise WontFit("memory ran out", fix="close other programs, or convert on a machine with more memory") from error


def _report(error: CalqueError, as_json: bool, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    print(error, file=sys.stderr)
    if as_json:
        _print_error(_error_object(type(error).__name__, error.exit_code, error.what, error.where, error.fix))
    return error.exit_code


def _report_unexpected(error: Exception, as_json: bool, verbose: bool) -> int:
    text = " ".join(str(error).split())
    if verbose:
        traceback.print_exception(error)
    print(f"internal error: {type(error).__name__}: {text} (run with -v for the traceback)", file=sys.stderr)
    if as_json:
        _print_error(_error_object(type(error).__name__, CalqueError.exit_code, text, (), "report it with the traceback that -v prints"))
    return CalqueError.exit_code


def _print_error(value: dict[str, Any]) -> None:
    # Where standard output itself is what failed, standard error has said it already.
    with contextlib.suppress(OSError):
        print_json(value)


def _error_object(kind: str, code: int, what: str, where: Sequence[str], fix: str) -> dict[str, Any]:
    return {"error": {"type": kind, "exit_code": code, "what": what, "where": list(where), "fix": fix}}


if __name__ == "__main__":
    sys.exit(main())
