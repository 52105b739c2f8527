"""The command line's grammar: one parser for `calque` and, as its first command, for `convert`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import calque
from calque.choices import LAYOUTS, LOGITS, MOST_THREADS, PRECISIONS, REPORT_FORMATS, REQUIREMENTS
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
    "bench": "measure artifacts side by side: time to the first token, tokens per second, memory; needs their runtimes alone",
    "compare": "hold artifacts of one model beside each other: the same integers, how far apart their answers are",
    "inspect": "show what an artifact is, what was proved, and whether its files are whole",
    "report": "write what was converted, measured and proved as Markdown, HTML, JUnit XML or JSON; needs no torch",
    "targets": "list the targets and what each needs here",
    "conformance": "convert a small model of every type that transformers has for a task, and record what came of each",
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


def _path(text: str) -> Path:
    if not text:  # to Path that is the current folder
        raise argparse.ArgumentTypeError("is empty, where the name of a file or folder is expected")
    return Path(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number, 0 or more")
    return int(text)


def _threads(text: str) -> int:
    if (count := _count(text)) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{count} threads are more than any machine gains from, at most {MOST_THREADS}")
    return count


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number, 1 or more")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of minutes")
    return minutes


def _nats(text: str) -> float:
    try:
        nats = float(text)
    except ValueError:
        nats = -1.0
    if not 0 <= nats < float("inf"):
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of nats, 0 or more")
    return nats


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not 1 <= _positive(index) <= _positive(count):
        raise argparse.ArgumentTypeError(f"`{text}` is not INDEX/COUNT, the first of four being 1/4")
    return int(index), int(count)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"`{text}` is not KEY=VALUE")
    return key, value


def _add_convert(command: Parser) -> None:
    what = command.add_argument_group("what to convert")
    what.add_argument("model", nargs="?", metavar="MODEL", help="hub id (org/name or org/name@revision), local folder, or builtin:NAME")
    what.add_argument("-m", "--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    files = "YAML files with the settings, one or several; flags win over them; MODEL stands before"
    what.add_argument("--recipe", type=_path, nargs="+", action="extend", metavar="FILE", help=files)
    what.add_argument("--task", metavar="TASK", help="optimum's task name; inferred from the config where it is left out")
    what.add_argument("--random-weights", action="store_true", default=None, help="seeded random weights: the config is enough")
    what.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that the model's repository brings")
    to = command.add_argument_group("to what")
    to.add_argument("--target", metavar="TARGET", help="runtime to convert for; `calque targets` lists them")
    to.add_argument("--precision", type=_one_of("precision", PRECISIONS), metavar="PRECISION", help=f"{', '.join(PRECISIONS)}")
    to.add_argument(
        "--logits", type=_one_of("choice of logits", LOGITS), metavar="WHICH", help=f"{', '.join(LOGITS)}; all where it is left out"
    )
    bound = "most tokens of prompt and answer together: the artifact refuses more, and a static cache has that many slots"
    to.add_argument("--max-length", type=_positive, metavar="N", help=bound)
    where = f"{' or '.join(LAYOUTS)}: which names the model's files have; flat where it is left out"
    to.add_argument("--layout", type=_one_of("layout", LAYOUTS), metavar="LAYOUT", help=where)
    to.add_argument("--calibration", metavar="FILE", help="text that the model is measured on before it is rounded")
    to.add_argument(
        "--set",
        type=_assignment,
        action="append",
        metavar="KEY=VALUE",
        help="an option of the target, or PASS.OPTION of one of its passes; may be repeated",
    )
    where = "where to write; ./MODEL-TARGET-PRECISION where it is left out. Of several conversions: the folder around theirs"
    to.add_argument("-o", "--output", type=_path, metavar="FOLDER", help=where)
    kept = "skip what is there, proved from the same recipe, model and versions, and undamaged; replace an artifact that is not"
    to.add_argument("--resume", action="store_true", help=kept)
    to.add_argument("--force", action="store_true", help="replace an artifact that is there, in one step, once the new one is proved")
    proof = command.add_argument_group("proof")
    proof.add_argument("--scenarios", metavar="NAMES", help="all, or names joined by commas; all where it is left out")
    text = "text that the model's quality is measured on, with the original's perplexity beside its own; random tokens where it is left out"
    proof.add_argument("--text", metavar="FILE", help=text)
    kl = "largest mean KL divergence from the original model; layers get more bits until it holds, else exit 3"
    proof.add_argument("--max-kl", type=_nats, metavar="NATS", help=kl)
    proof.add_argument(
        "--max-size", metavar="SIZE", help="most that graph and weights may take, promoted layers too, else exit 3: 500MB, 2GiB"
    )
    one = "measure what the model loses by each layer's integers alone"
    proof.add_argument("--sensitivity", action="store_true", default=None, help=one)
    need = "exit 5 where the artifact could not be built or executed here"
    proof.add_argument("--require", type=_one_of("requirement", REQUIREMENTS), metavar="WHAT", help=f"{' or '.join(REQUIREMENTS)}: {need}")
    how = command.add_argument_group("how")
    how.add_argument("--plan", action="store_true", help="say what would be made, how large, and what is unsupported; write nothing")
    how.add_argument("--max-memory", metavar="SIZE", help="memory that converting may use: 2GB, 512MiB")
    how.add_argument("--threads", type=_count, metavar="N", help="threads to compute with; 0 lets the runtime choose")


def _add_folder(command: Parser) -> None:
    command.add_argument("folder", type=_path, metavar="FOLDER", help="an artifact that `calque convert` wrote")


def _add_threads(command: Parser) -> None:
    command.add_argument("--threads", type=_threads, default=0, metavar="N", help="threads to compute with; 0 lets the runtime choose")


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


def _add_bench(command: Parser) -> None:
    several = "artifacts that `calque convert` wrote; of several, the others are compared with the first"
    command.add_argument("folders", type=_path, nargs="+", metavar="FOLDER", help=several)
    lengths = "lengths of the prompts, of an encoder's texts; 128 and 512 where it is left out"
    command.add_argument("--prompt-tokens", type=_positive, nargs="+", default=[128, 512], metavar="N", help=lengths)
    new = "tokens that follow each prompt, the first one included; 64 where it is left out"
    command.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help=new)
    rounds = "rounds, in each of which every artifact runs once with every prompt; 3 where it is left out"
    command.add_argument("--rounds", type=_positive, default=3, metavar="N", help=rounds)
    rows = "rows of a call, all alike; 1 where it is left out; tokens/s are those of one row, texts/s of all"
    command.add_argument("--batch-size", type=_positive, default=1, metavar="N", help=rows)
    _add_threads(command)


def _add_compare(command: Parser) -> None:
    command.add_argument(
        "folders", type=_path, nargs="+", metavar="FOLDER", help="artifacts of one model, for whatever targets; two or more"
    )
    command.add_argument("--record", action="store_true", help="write what was found into each artifact's report.json as well")
    _add_threads(command)


def _add_report(command: Parser) -> None:
    of = "an artifact, a rejected one, or a folder with the matrix.json of several conversions; may be repeated"
    command.add_argument("folders", type=_path, nargs="+", metavar="FOLDER", help=of)
    formats = f"{', '.join(REPORT_FORMATS)}; markdown if left out"
    command.add_argument("--format", type=_one_of("format", REPORT_FORMATS), metavar="FORMAT", help=formats)
    command.add_argument("-o", "--output", type=_path, metavar="FILE", help="where to write, in one step; standard output if left out")


def _add_nothing(command: Parser) -> None:
    """Leave the command with the flags that every command has."""


def _add_conformance(command: Parser) -> None:
    task = "optimum's task name; text generation if left out"
    command.add_argument("--task", default="text-generation-with-past", metavar="TASK", help=task)
    command.add_argument("--target", default="onnxruntime", metavar="TARGET", help="what to convert for, in the target's own precision")
    length = "most tokens of a row; a static cache is filled to the last of so many slots"
    command.add_argument("--max-length", type=_positive, metavar="N", help=length)
    command.add_argument("--types", type=_names, default=(), metavar="NAMES", help="types joined by commas; all of the task if left out")
    command.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="run the I-th of N parts of the types")
    command.add_argument(
        "--results", type=_path, default=Path("support.json"), metavar="FILE", help="the records, added to; support.json if left out"
    )
    again = "make records of these statuses again although nothing changed: passed, failed, unsupported, error, all, joined by commas"
    command.add_argument("--again", type=_statuses, default=frozenset(), metavar="STATUSES", help=again)
    command.add_argument("--timeout", type=_minutes, default=10.0, metavar="MINUTES", help="how long one type may take; 10 if left out")


def _statuses(text: str) -> frozenset[str]:
    return frozenset(_one_of("status", ("passed", "failed", "unsupported", "error", "all"))(name) for name in _names(text))


_ADDERS: dict[str, Callable[[Any], None]] = {
    "convert": _add_convert,
    "validate": _add_validate,
    "generate": _add_generate,
    "bench": _add_bench,
    "compare": _add_compare,
    "inspect": _add_folder,
    "report": _add_report,
    "targets": _add_nothing,
    "conformance": _add_conformance,
    "doctor": _add_nothing,
}
