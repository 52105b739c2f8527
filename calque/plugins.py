"""Passes and targets that other installed distributions bring, by entry points.

Nothing of theirs is imported before it is asked for by name, so a broken one is in nobody's way but its user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from calque.errors import TargetUnavailable, UsageError

PASSES = "calque.passes"
TARGETS = "calque.targets"


def names(group: str) -> set[str]:
    """Return the name of every entry point of the group; nothing is imported."""
    return {entry.name for entry in entry_points(group=group)}


def claimed(group: str, name: str, built_in: bool) -> EntryPoint | None:
    """Return the entry point that brings ``name``, None if it is built in and nothing else claims it.

    Raises:
        UsageError: several claim the name, each with its distribution.
    """
    found = sorted(entry_points(group=group, name=name), key=described)
    if len(found) + built_in > 1:
        lines = [*(["Calque itself"] if built_in else []), *map(described, found)]
        fix = "uninstall the distributions that you do not need"
        raise UsageError(f"several of {group} are called {name!r}, so which is meant is unknown", lines, fix)
    return found[0] if found else None


def load(entry: EntryPoint, faults: Callable[[Any, str], Iterable[str]]) -> Any:
    """Return what the entry point names, imported; ``faults`` lists what is wrong with it.

    Raises:
        TargetUnavailable: it cannot be imported, or is no such thing; with its distribution and name.
    """
    try:
        found = entry.load()
    except Exception as error:  # whatever the plug-in's own code raises
        reason = f"{type(error).__name__}: {error}"
        raise TargetUnavailable("a plug-in cannot be imported", [described(entry), reason], "repair or uninstall it") from error
    if wrong := list(faults(found, entry.name)):
        raise TargetUnavailable("a plug-in is not what its entry point says", [described(entry), *wrong], "repair or uninstall it")
    return found


def versions(target: str, passes: Iterable[str]) -> dict[str, str]:
    """Return the version of each distribution that brings the target or one of the passes."""
    entries = [*entry_points(group=TARGETS, name=target)]
    entries += [entry for name in passes for entry in entry_points(group=PASSES, name=name)]
    return {entry.dist.name: entry.dist.version for entry in entries if entry.dist}


def described(entry: EntryPoint) -> str:
    """Return the entry point and its distribution as one line."""
    owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"
    return f"{owner}, entry point {entry.name} = {entry.value} of {entry.group}"
