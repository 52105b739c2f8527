"""docs/cli.md holds what the parser accepts: run this file after changing a flag. A test holds the two equal."""

from __future__ import annotations

import argparse
from pathlib import Path

from calque.arguments import COMMANDS, EXIT_CODES, build_parser

PAGE = Path(__file__).with_name("cli.md")

OPENING = """# Command line

<!-- Written by docs/cli_reference.py from the parser; do not edit. -->

`convert …` is `calque convert …`. ImageMagick may own a `convert` on the same machine: whichever comes first on `PATH` runs,
`calque convert` is always Calque's.

Results go to stdout; progress and errors go to stderr. With `--json` stdout holds exactly one JSON object, an error too:
`{"error": {"type", "exit_code", "what", "where", "fix"}}`. Flags are never abbreviated.
"""


def page() -> str:
    """Return the whole page."""
    _, commands = build_parser()
    parts = [OPENING]
    for name, text in COMMANDS.items():
        parts.append(f"## calque {name}\n\n{text[0].upper()}{text[1:]}.\n\n{_flags(commands[name])}")
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    parts.append(f"## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _flags(command: argparse.ArgumentParser) -> str:
    rows = [f"| {_spelling(action)} | {_cell(action.help or '')} |" for action in command._actions]
    return "\n".join(["| argument | meaning |", "|---|---|", *rows, ""])


def _spelling(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    value = f" {action.metavar}" if action.metavar else ""
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
