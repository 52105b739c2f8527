"""Every failure Calque reports on purpose, and the exit code each becomes.

::

    CalqueError (1)
    ├── UsageError (2)              bad flag, bad value, output in the way
    │   └── RecipeError (2)         a recipe that does not follow the schema
    ├── ParityFailed (3)            the artifact does not agree with the eager model
    │   └── BuildFailed (4)         its numbers are right, and the runtime's builder refuses it
    ├── Unsupported (4)             model, operator or option that a target or task cannot express
    ├── TargetUnavailable (5)       an SDK or a device is missing
    ├── WontFit (6)                 memory or disk is too small
    └── SourceUnreadable (7)        model not found, gated, truncated, corrupt, pickle, needs remote code
        ├── WeightMismatch (7)      parameters without bytes, or bytes without a parameter
        └── ArtifactUnreadable (7)  a folder that is not an artifact, is damaged, or is of a newer schema

A message says what is wrong, lists where (every offender, the first twenty in full), and says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

SHOWN = 20


class CalqueError(Exception):
    """What went wrong, where, and what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, where: Sequence[str] = (), fix: str = "") -> None:
        self.what = what
        self.where = tuple(where)
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        """Return the whole message, offenders one a line."""
        lines = [f"{type(self).__name__}: {self.what}"]
        lines += [f"  {line}" for line in self.where[:SHOWN]]
        if len(self.where) > SHOWN:
            lines.append(f"  … and {len(self.where) - SHOWN} more")
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        return "\n".join(lines)


class UsageError(CalqueError):
    """The command line asks for something that does not exist or would destroy something."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe does not follow the schema."""


class ParityFailed(CalqueError):
    """The artifact disagrees with the untouched eager model."""

    exit_code = 3


class BuildFailed(ParityFailed):
    """The runtime's builder refuses an artifact whose numbers are right: it is rejected like one whose numbers are not."""

    exit_code = 4


class Unsupported(CalqueError):
    """The model, an operator or an option cannot be expressed."""

    exit_code = 4


class TargetUnavailable(CalqueError):
    """An SDK or a device that the request needs is not here."""

    exit_code = 5


class WontFit(CalqueError):
    """The work would not fit in memory or on disk."""

    exit_code = 6


class SourceUnreadable(CalqueError):
    """The model cannot be read."""

    exit_code = 7


class WeightMismatch(SourceUnreadable):
    """Parameters and checkpoint tensors do not match one to one."""


class ArtifactUnreadable(SourceUnreadable):
    """The folder is not an artifact, is damaged, or was written by a newer Calque."""


INTERRUPTED = 130
