"""Targets: a traced model in, files that one runtime loads out. One file each, named as users type it.

Names use hyphens, their files underscores; files that begin with an underscore are shared by several targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from calque.errors import UsageError
from calque.options import construct

if TYPE_CHECKING:
    from calque.artifact import Artifact, GraphSpec, Limits
    from calque.passes import Pass
    from calque.session import Session
    from calque.traced import TracedModel


@dataclass(frozen=True)
class Problem:
    """One thing a target cannot express: where it stands in the graph and in the model's source, and the way out."""

    node: str
    module: str
    source: str
    why: str
    fix: str

    def __str__(self) -> str:
        """Return the problem as one line."""
        where = " ".join(part for part in (self.module, self.source) if part)
        return f"{self.node}: {self.why} ({where}); {self.fix}"


@dataclass(frozen=True)
class Emitted:
    """What a target wrote: its graphs, and what its artifact must not be asked to do."""

    graphs: dict[str, GraphSpec]
    limits: Limits


class Target(Protocol):
    """One runtime. Its dataclass fields are its options, ``--set key=value``."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]

    def problems(self, model: TracedModel) -> list[Problem]:
        """Return everything in the graph that this target cannot express."""
        ...

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return the passes this target wants, in order."""
        ...

    def lower(self, model: TracedModel) -> Any:
        """Return the model in the target's own representation, without weights."""
        ...

    def emit(self, lowered: Any, model: TracedModel, folder: Path) -> Emitted:
        """Write the target's files into ``folder``; weights stream through."""
        ...

    def open(self, artifact: Artifact, threads: int = 0) -> Session:
        """Return a session that runs the artifact here on so many threads; 0 leaves the number to the runtime.

        Raises:
            TargetUnavailable: the runtime or its device is not here.
        """
        ...

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return what the target needs, whether it is here, and what to do if not."""
        ...


def package_rows(needs: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return a doctor's row for each package: its version, or that it is missing and what it is needed for."""
    rows = []
    for package, purpose in needs.items():
        try:
            rows.append((package, version(package), purpose))
        except PackageNotFoundError:
            rows.append((package, "missing", f"{purpose}: pip install 'calque[convert]'"))
    return rows


def names() -> list[str]:
    """Return the name of every target, as users type it."""
    return sorted(module.name.replace("_", "-") for module in iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> type[Target]:
    """Return the target class called ``name``.

    Raises:
        UsageError: no such target, with those there are.
    """
    if name not in names():
        raise UsageError(f"there is no target {name!r}", fix=f"targets: {', '.join(names())}")
    module = import_module(f"calque.targets.{name.replace('-', '_')}")
    target: type[Target] = module.TARGET
    return target


def make(name: str, options: Mapping[str, Any]) -> Target:
    """Return the target called ``name`` with ``options`` as its fields.

    Raises:
        UsageError: no such target.
        RecipeError: no such option, or a value that it cannot take.
    """
    made: Target = construct(load(name), options, f"target {name}")
    return made
