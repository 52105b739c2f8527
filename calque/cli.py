"""The commands `calque` and `convert`: parse, call, print; every failure becomes its exit code."""

from __future__ import annotations

import sys

try:
    import atexit
    import contextlib
    import os
    import signal
    import traceback
    import warnings
    from collections.abc import Sequence
    from typing import Any

    from calque.arguments import parse
    from calque.commands import HANDLERS
    from calque.console import print_json
    from calque.errors import INTERRUPTED, CalqueError
    from calque.failures import explained
    from calque.interrupts import interrupted, terminations_as_interrupts
except KeyboardInterrupt:  # before there is a `main` to catch it
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `calque` and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json, verbose = "--json" in arguments, bool({"-v", "--verbose"} & set(arguments))
    try:
        with terminations_as_interrupts():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _report_interrupt(as_json)
    except BrokenPipeError:
        # The reader left, as `| head` does. Python would complain once more while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CalqueError.exit_code
    except Exception as error:
        if interrupted():  # a library caught the interrupt, and went on with what it had left half done
            return _report_interrupt(as_json)
        if isinstance(error, CalqueError):
            return _report(error, as_json, verbose)
        return _report_unexpected(error, as_json, verbose)
    finally:
        # Last to be registered, first to run: what other libraries do at exit may then be interrupted without a traceback.
        atexit.register(_end_silently_when_interrupted)


def _end_silently_when_interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
    except Exception as error:
        known = explained(error, args.command)
        if known is None or known is error:
            raise
        raise known from error


def _report(error: CalqueError, as_json: bool, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    print(error, file=sys.stderr)
    if as_json:
        _print_error(_error_object(type(error).__name__, error.exit_code, error.what, error.where, error.fix))
    return error.exit_code


def _report_interrupt(as_json: bool) -> int:
    print("interrupted", file=sys.stderr)
    if as_json:
        _print_error(_error_object("Interrupted", INTERRUPTED, "interrupted", (), "run it again"))
    return INTERRUPTED


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
