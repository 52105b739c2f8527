"""The command line's grammar: one parser for `calque` and, as its first command, for `convert`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import calque
from calque.choices import LOGITS, PRECISIONS, REQUIREMENTS
from calque.errors import UsageError
from calque.suggest import nearest

EXIT_CODES = {
    0: "done: nothing failed and the numbers were proved right",
    1: "unexpected error",
    2: "bad usage or recipe",
    3: "parity failed: the artifact disagrees with the eager model",
    4: "model, operator or option unsupported",
    5: "SDK or hardware missing",
    6: "would not fit in memory or on disk",
    7: "source or artifact unreadable",
    130: "interrupted",
}

COMMANDS = {
    "convert": "turn a model into an artifact and prove it against the eager model",
    "validate": "check an artifact against the reference it carries; needs onnxruntime, not torch",
    "generate": "continue a text with an artifact",
    "inspect": "show what an artifact is, what was proved, and whether its files are whole",
    "targets": "list the targets and what each needs here",
    "doctor": "show what this machine and installation have, and what is missing for convert",
}


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of leaving the process, so that --json and exit codes hold for bad usage too."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with what argparse found."""
        raise UsageError(message, fix=f"{self.prog} --help lists every flag")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line.

    Raises:
        UsageError: unknown command, flag or value, with the nearest known one; or a missing value.
    """
    parser, commands = build_parser()
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is None and not {"-h", "--help", "--version"} & set(arguments):
        raise UsageError("no command was given", [f"{name}  {text}" for name, text in COMMANDS.items()], "calque --help")
    if first is not None and first not in commands:
        fix = "calque --help lists every command; a model is converted by `calque convert MODEL`"
        raise UsageError(f"`{first}` is not a command{nearest(first, commands)}", fix=fix)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = commands[args.command]._option_string_actions
        flags = [argument for argument in unknown if argument.startswith("-")]
        lines = [f"{flag}{nearest(flag.split('=')[0], known)}" for flag in flags] or [
            f"{argument}  not expected here" for argument in unknown
        ]
        raise UsageError(f"calque {args.command} does not know this", lines, f"calque {args.command} --help lists every flag")
    return args


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the whole parser, and the parser of each command by name."""
    parser = Parser(prog="calque", description=(calque.__doc__ or "").splitlines()[0], allow_abbrev=False, epilog=_exit_codes())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"calque {calque.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {}
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        _ADDERS[name](command)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
        command.add_argument("-v", "--verbose", action="store_true", help="print the traceback of an error")
        commands[name] = command
    return parser, commands


def _exit_codes() -> str:
    return "exit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())


def _one_of(kind: str, names: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"`{text}` is not a {kind}, which are: {', '.join(names)}{nearest(text, names)}")
        return text

    return check


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"`{text}` is not KEY=VALUE")
    return key, value


def _add_convert(command: Parser) -> None:
    what = command.add_argument_group("what to convert")
    what.add_argument("model", nargs="?", metavar="MODEL", help="hub id (org/name or org/name@revision), local folder, or builtin:NAME")
    what.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    what.add_argument("--recipe", type=Path, metavar="FILE", help="YAML file with the settings; flags win over it")
    what.add_argument("--task", metavar="TASK", help="optimum's task name; inferred from the config where it is left out")
    what.add_argument("--random-weights", action="store_true", default=None, help="seeded random weights: the config is enough")
    what.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that the model's repository brings")
    to = command.add_argument_group("to what")
    to.add_argument("--target", metavar="TARGET", help="runtime to convert for; `calque targets` lists them")
    to.add_argument("--precision", type=_one_of("precision", PRECISIONS), metavar="PRECISION", help=f"{', '.join(PRECISIONS)}")
    to.add_argument(
        "--logits", type=_one_of("choice of logits", LOGITS), metavar="WHICH", help=f"{', '.join(LOGITS)}; all where it is left out"
    )
    to.add_argument("--calibration", metavar="FILE", help="text that activation ranges are measured on")
    to.add_argument("--set", type=_assignment, action="append", metavar="KEY=VALUE", help="an option of the target; may be repeated")
    to.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where to write; ./MODEL-TARGET-PRECISION where it is left out")
    to.add_argument("--force", action="store_true", help="replace an artifact that is there, in one step, once the new one is proved")
    proof = command.add_argument_group("proof")
    proof.add_argument("--scenarios", metavar="NAMES", help="all, or names joined by commas; all where it is left out")
    need = "exit 5 where the artifact could not be built or executed here"
    proof.add_argument("--require", type=_one_of("requirement", REQUIREMENTS), metavar="WHAT", help=f"{' or '.join(REQUIREMENTS)}: {need}")
    how = command.add_argument_group("how")
    how.add_argument("--plan", action="store_true", help="say what would be made, how large, and what is unsupported; write nothing")
    how.add_argument("--max-memory", metavar="SIZE", help="memory that converting may use: 2GB, 512MiB")
    how.add_argument("--threads", type=_count, metavar="N", help="threads to compute with; 0 lets the runtime choose")


def _add_folder(command: Parser) -> None:
    command.add_argument("folder", type=Path, metavar="FOLDER", help="an artifact that `calque convert` wrote")


def _add_threads(command: Parser) -> None:
    command.add_argument("--threads", type=_count, default=0, metavar="N", help="threads to compute with; 0 lets the runtime choose")


def _add_validate(command: Parser) -> None:
    _add_folder(command)
    _add_threads(command)


def _add_generate(command: Parser) -> None:
    _add_folder(command)
    command.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the text to continue")
    command.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="stop after this many tokens; 64 where it is left out"
    )
    command.add_argument("--chat", action="store_true", help="wrap the text in the model's chat template, as a user's turn")
    _add_threads(command)


def _add_nothing(command: Parser) -> None:
    """Leave the command with the flags that every command has."""


_ADDERS: dict[str, Callable[[Any], None]] = {
    "convert": _add_convert,
    "validate": _add_validate,
    "generate": _add_generate,
    "inspect": _add_folder,
    "targets": _add_nothing,
    "doctor": _add_nothing,
}
