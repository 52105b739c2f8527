"""Targets: a traced model in, files that one runtime loads out. One file each, named as users type it.

Names use hyphens, their files underscores; files that begin with an underscore are shared by several targets. Other
distributions add targets by entry points of the group ``calque.targets``: see docs/adding.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from calque import plugins
from calque.doctor import INSTALL_CONVERT
from calque.errors import UsageError
from calque.options import construct

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedConfig

    from calque.artifact import Artifact, Check, GraphSpec, Limits
    from calque.choices import Requirement
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
        return f"{self.node}: {self.why}" + (f" ({where})" if where else "")


def without_cache(model: TracedModel, options: Iterable[str]) -> list[Problem]:
    """Return options that say how keys and values are kept, which would be without effect on a model that keeps none."""
    why = "the model keeps no keys and values from call to call"
    return [] if model.states else [Problem(option, "", "", why, "leave it out") for option in options]


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
            TargetUnavailable: the runtime or its device is not here, or has no kernels for the artifact's precision; the graph
                is then proved in its place, and the artifact's execution is not run.
        """
        ...

    def doctor(self) -> list[tuple[str, str, str]]:
        """Return what the target needs, whether it is here, and what to do if not."""
        ...


@runtime_checkable
class Finishes(Protocol):
    """A target that adds to its folder, or arranges it, once model and companions are there and before anything is proved."""

    def layouts(self, precision: str) -> tuple[str, ...]:
        """Return the values of the recipe's ``layout`` that the target follows."""
        ...

    def finish(self, artifact: Artifact, config: PreTrainedConfig) -> tuple[Artifact, list[str]]:
        """Return the artifact as its folder is now, and sentences that the user should know."""
        ...


@runtime_checkable
class Rounds(Protocol):
    """A target whose artifacts may round activations to integers, as its runtime does and the graph does not say."""

    def exact(self, artifact: Artifact, threads: int = 0) -> Session | None:
        """Return a session over the same files that rounds no activations; None where the artifact rounds none."""
        ...


@runtime_checkable
class RunsBlocks(Protocol):
    """A target whose artifacts can be run here some nodes at a time, where the whole would not fit into memory."""

    def blocks(self, artifact: Artifact, threads: int, nbytes: int, exact: bool = False) -> Session:
        """Return a session that holds about ``nbytes`` of weights at a time; ``exact``: it rounds no activations."""
        ...


@runtime_checkable
class Bounds(Protocol):
    """A target whose artifacts have limits that the model has not."""

    def limits(self, model: TracedModel) -> Limits:
        """Return what the artifact must not be asked to do."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """A target that has all weights in memory at once while it writes its file."""

    def emission_bytes(self, weights: int) -> int:
        """Return about how much memory writing takes of so many bytes of weights, what the tools take aside."""
        ...


@runtime_checkable
class HoldsIntegers(Protocol):
    """A target whose files say which integers they hold."""

    def integers(self, artifact: Artifact) -> Mapping[str, tuple[NDArray[np.int8], NDArray[np.generic]]]:
        """Return q int8 [out, in], signed and unpacked, and scale [out, groups] of every matrix of integers, by the file's name for it."""
        ...


@runtime_checkable
class Chooses(Protocol):
    """A target that has no files of its own: it takes the artifact that was the fastest of several targets' when they were measured."""

    @property
    def judged_by(self) -> str:
        """What of a generator is compared, in a word."""
        ...

    @property
    def new_tokens(self) -> int:
        """How many tokens a generator is asked for after each prompt."""
        ...

    @property
    def rounds(self) -> int:
        """How often each artifact is measured."""
        ...

    def candidates_of(self, precision: str) -> tuple[str, ...]:
        """Return the targets that are tried in that precision.

        Raises:
            UsageError: none has it.
        """
        ...

    def cost(self, figures: Mapping[str, Any], new_tokens: int) -> float:
        """Return the milliseconds that are compared, of what was measured of one artifact at one length."""
        ...


@dataclass(frozen=True)
class Built:
    """What came of building an artifact for its runtime, and of running what was built on the runtime's device.

    ``measured``: seconds, bytes and what else was found out, for report.json. ``notes``: sentences that the user should know.
    ``tools``: the versions that what was built depends on, by package.
    """

    build: Check
    execution: Check
    failures: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Requires(Protocol):
    """A target that needs more than packages of Python, by its options or by what is asked of it."""

    def require(self, needed: Requirement | None) -> None:
        """Leave quietly if what the options ask for by name is here, and what builds or runs the artifact where that is needed.

        Raises:
            TargetUnavailable: it is not; said before any work.
        """
        ...


@runtime_checkable
class Builds(Requires, Protocol):
    """A target whose runtime makes something of the artifact before it runs it, perhaps with what is not on this machine."""

    def builder_bytes(self, weights: int) -> int:
        """Return about how much memory building takes of so many bytes of weights."""
        ...

    def build(self, artifact: Artifact, load: Callable[[], TracedModel], room: int | None) -> Built:
        """Return what building came to in at most ``room`` bytes of memory, None meaning any.

        ``load`` gives the traced model after its passes. What is built goes into the artifact's folder.
        """
        ...


def exact(target: Target, artifact: Artifact, threads: int = 0) -> Session | None:
    """Return a session over the artifact's files that rounds no activations; None where the artifact rounds none."""
    return target.exact(artifact, threads) if isinstance(target, Rounds) else None


def require(target: Target, needed: Requirement | None) -> None:
    """Leave quietly if what the target's options ask for by name is here, and what builds or runs the artifact where that is needed.

    Raises:
        TargetUnavailable: it is not.
    """
    if isinstance(target, Requires):
        target.require(needed)


def packages(target: Target) -> tuple[str, ...]:
    """Return the packages, beside those of every conversion, whose versions decide what the target writes."""
    return tuple(getattr(target, "packages", ()))


def layouts(target: Target, precision: str) -> tuple[str, ...]:
    """Return the layouts that the target can give its folder."""
    return target.layouts(precision) if isinstance(target, Finishes) else ("flat",)


def finish(target: Target, artifact: Artifact, config: PreTrainedConfig) -> tuple[Artifact, list[str]]:
    """Return what the target makes of a folder that holds the model and its companions, and sentences about it."""
    return target.finish(artifact, config) if isinstance(target, Finishes) else (artifact, [])


def package_rows(needs: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return a doctor's row for each package: its version, or that it is missing and what it is needed for."""
    return [_package_row(package, purpose, "missing", INSTALL_CONVERT) for package, purpose in needs.items()]


def optional_rows(offers: dict[str, str]) -> list[tuple[str, str, str]]:
    """Return a doctor's row for each package that a target does without: its version, or that it is not there and what it would do."""
    return [_package_row(package, offer, "not installed", f"pip install 'calque[{package}]'") for package, offer in offers.items()]


def _package_row(package: str, purpose: str, absent: str, install: str) -> tuple[str, str, str]:
    try:
        return package, version(package), purpose
    except PackageNotFoundError:
        return package, absent, f"{purpose}: {install}"


def names() -> list[str]:
    """Return the name of every target, as users type it, plug-ins' too."""
    return sorted({*built_in(), *plugins.names(plugins.TARGETS)})


def built_in() -> list[str]:
    """Return the name of every target of Calque's own."""
    return sorted(module.name.replace("_", "-") for module in iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> type[Target]:
    """Return the target class called ``name``.

    Raises:
        UsageError: no such target, with those there are; or several of that name.
        TargetUnavailable: it comes from a plug-in that is broken.
    """
    if name not in names():
        raise UsageError(f"there is no target {name!r}", fix=f"targets: {', '.join(names())}")
    entry = plugins.claimed(plugins.TARGETS, name, name in built_in())
    module = f"calque.targets.{name.replace('-', '_')}"
    target: type[Target] = plugins.load(entry, _faults) if entry else import_module(module).TARGET
    return target


METHODS = ("problems", "passes", "lower", "emit", "open", "doctor")


def _faults(found: Any, name: str) -> Iterator[str]:
    """Yield what keeps the object of an entry point from being the target called ``name``."""
    if not isinstance(found, type) or not is_dataclass(found):
        yield f"it is no dataclass but {found!r}"
        return
    if getattr(found, "name", None) != name or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        yield f"its `name` must be that of its entry point, {name!r}, lower case words joined by hyphens"
    if not isinstance(getattr(found, "precisions", None), tuple):
        yield "it has no `precisions`, a tuple of names"
    if missing := [method for method in METHODS if not callable(getattr(found, method, None))]:
        yield f"it lacks {', '.join(missing)}"
    needed = [one.name for one in fields(found) if one.init and one.default is MISSING and one.default_factory is MISSING]
    if needed:
        yield f"its options need defaults: {', '.join(needed)}"


def make(name: str, options: Mapping[str, Any]) -> Target:
    """Return the target called ``name`` with ``options`` as its fields; those with a dot are options of its passes, and left out.

    Raises:
        UsageError: no such target.
        RecipeError: no such option, or a value that it cannot take.
    """
    own = {key: value for key, value in options.items() if "." not in key}
    made: Target = construct(load(name), own, f"target {name}")
    return made


def deciding_passes(name: str, options: Mapping[str, Any], precision: str) -> list[str]:
    """Return the options without which the target would take other passes: beside a list of passes they would do nothing."""
    listed = make(name, options).passes(precision)
    lines = []
    for key, value in options.items():
        if "." in key:
            lines.append(f"options: {key}: {value}")
            continue
        try:
            without = make(name, {other: given for other, given in options.items() if other != key}).passes(precision)
        except UsageError:
            continue  # which the others need; they are named by themselves
        if without != listed:
            lines.append(f"options: {key}: {value}")
    return lines
