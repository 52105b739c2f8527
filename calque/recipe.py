"""A recipe: everything that decides what a conversion makes, checked before any work begins."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from calque.choices import Logits, Precision, Requirement
from calque.recipe_errors import problems_of, recipe_error
from calque.strict_yaml import Document, read_document

# Settings of the machine that converts. They change how long it takes, never a byte of what comes out.
_MACHINE_SETTINGS = frozenset({"max_memory", "threads", "require", "matrix"})

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes that a size such as ``2GB``, ``512MiB`` or ``1.5 GiB`` stands for.

    Raises:
        ValueError: not a positive number with a unit that is known.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS or float(match[1]) == 0:
        raise ValueError("must be a size such as 2GB, 512MiB or 1.5GiB")
    return math.floor(float(match[1]) * _UNITS[match[2]])


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _ordered(value: tuple[int, int, int]) -> tuple[int, int, int]:
    if not 1 <= value[0] <= value[1] <= value[2]:
        raise ValueError(f"must be min, typical, max with 1 ≤ min ≤ typical ≤ max; found {list(value)}")
    return value


def _scenarios(value: object) -> object:
    if value == "all" or (isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)):
        return value
    raise ValueError(f"must be all, or a list of scenario names; found {value!r}")


def _pass_entry(value: object) -> object:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        if isinstance(name, str) and isinstance(options, Mapping | None):
            return {name: dict(options or {})}
    raise ValueError(f"must be a pass name, or one name with its options, {{quantize_weights: {{group: 64}}}}; found {value!r}")


def _target_name(value: str) -> str:
    if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", value):
        return value
    raise ValueError(f"target names are lower case words joined by hyphens, such as torchscript-lite; found {value!r}")


Name = Annotated[StrictStr, StringConstraints(min_length=1)]
TargetName = Annotated[Name, AfterValidator(_target_name)]
Count = Annotated[StrictInt, Field(ge=1)]
Bytes = Annotated[StrictInt, Field(ge=1), BeforeValidator(_size, json_schema_input_type=int | str)]
PassEntry = Annotated[str | dict[str, dict[str, Any]], BeforeValidator(_pass_entry)]
Range = Annotated[tuple[StrictInt, StrictInt, StrictInt], AfterValidator(_ordered)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dims(_Settings):
    """How large each dynamic dimension gets: smallest, typical, largest; ``max_length`` bounds prompt and answer together."""

    batch_size: Range = (1, 1, 8)
    sequence_length: Range = (1, 128, 2048)
    max_length: Count | None = None


class Calibration(_Settings):
    """The text that activation ranges are measured on."""

    text: Name
    samples: Count = 128


class Parity(_Settings):
    """Which scenarios the artifact must pass: all that its limits allow, or those named."""

    scenarios: Annotated[Literal["all"] | tuple[Name, ...], BeforeValidator(_scenarios)] = "all"


class Matrix(_Settings):
    """Axes of a cartesian product; each cell is a recipe of its own."""

    model: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    target: Annotated[tuple[TargetName, ...], Field(min_length=1)] | None = None
    precision: Annotated[tuple[Precision, ...], Field(min_length=1)] | None = None


def _default_precision(settings: dict[str, Any]) -> Precision:
    return "fp16" if settings.get("target") == "tensorrt" else "fp32"


class Recipe(_Settings):
    """What to convert, to what, how, and what must be proved. Frozen; unknown keys are refused."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: Name
    task: Name | None = None
    target: TargetName
    precision: Precision = Field(default_factory=_default_precision)
    dims: Dims = Dims()
    options: dict[str, Any] = Field(default_factory=dict)
    passes: tuple[PassEntry, ...] | None = None
    calibration: Calibration | None = None
    max_memory: Bytes | None = None
    parity: Parity = Parity()
    matrix: Matrix | None = None
    logits: Logits = "all"
    random_weights: StrictBool = False
    trust_remote_code: StrictBool = False
    require: Requirement | None = None
    threads: Annotated[StrictInt, Field(ge=0)] = 0

    @model_validator(mode="before")
    @classmethod
    def _first_cell(cls, value: object) -> object:
        """Take a key that only the matrix gives from its first cell."""
        matrix = value.get("matrix") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(matrix, Mapping):
            return value
        firsts = {key: axis[0] for key in ("model", "target") if isinstance(axis := matrix.get(key), list | tuple) and axis}
        return {**firsts, **value}

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Return the recipe in a YAML file; ``overrides`` are flags: they replace top-level keys, axes of the matrix too.

        Raises:
            RecipeError: every problem at once, with the line of each and the nearest known key.
        """
        document = read_document(path)
        if not isinstance(document.data, dict):
            found = "nothing" if document.data is None else type(document.data).__name__
            raise recipe_error([f"line 1: a recipe is a mapping of keys to values; found {found}"], str(path))
        return cls._checked({**document.data}, dict(overrides or {}), document, str(path))

    @classmethod
    def of(cls, settings: Mapping[str, Any], origin: str = "the command line") -> Recipe:
        """Return the recipe that plain settings describe.

        Raises:
            RecipeError: every problem at once, with the nearest known key.
        """
        return cls._checked({}, dict(settings), Document({}, {}), origin)

    @classmethod
    def _checked(cls, data: dict[str, Any], flags: dict[str, Any], document: Document, origin: str) -> Recipe:
        if isinstance(data.get("matrix"), dict):
            data["matrix"] = {axis: cells for axis, cells in data["matrix"].items() if axis not in flags} or None
        for key in ("options", "parity"):
            if isinstance(data.get(key), dict) and isinstance(flags.get(key), dict):
                flags[key] = {**data[key], **flags[key]}
        try:
            return cls.model_validate({**data, **flags})
        except ValidationError as error:
            raise recipe_error(problems_of(error, cls, document, flags), origin) from error

    def expand(self) -> dict[str, Recipe]:
        """Return every cell of the matrix by the name of its folder; the recipe alone where there is no matrix."""
        if self.matrix is None:
            return {default_folder(self): self}
        given = {name: getattr(self, name) for name in self.model_fields_set - {"matrix", "schema_version"}}
        axes = {axis: cells for axis in ("model", "target", "precision") if (cells := getattr(self.matrix, axis))}
        cells = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
        recipes = [Recipe(**{**given, **cell}) for cell in cells]
        folders = {default_folder(recipe): recipe for recipe in recipes}
        if len(folders) < len(recipes):
            names = [default_folder(recipe) for recipe in recipes]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise recipe_error([f"matrix: several cells would be written to {name}" for name in twice], "the recipe")
        return folders

    def as_manifest(self) -> dict[str, Any]:
        """Return the recipe as manifest.json records it: defaults written out, no paths, no settings of the machine."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(_MACHINE_SETTINGS))
        data["model"] = _without_path(self.model)
        if self.calibration:
            data["calibration"]["text"] = Path(self.calibration.text).name
        return data


def unbuilt_settings(recipe: Recipe) -> list[str]:
    """Return one line for each setting that the schema knows and this version cannot follow."""
    lines = []
    if recipe.calibration is not None:
        lines.append("calibration  no precision that needs it is built")
    if recipe.max_memory is not None:
        lines.append("max_memory  no limit is enforced; leave it out")
    if recipe.matrix is not None:
        lines.append(f"matrix  one recipe at a time; convert these one by one: {', '.join(recipe.expand())}")
    return lines


def default_folder(recipe: Recipe) -> str:
    """Return the name of the folder a recipe is written to when none is given: ``{model}-{target}-{precision}``."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", _model_name(recipe.model)).strip(".-")
    return f"{model[:100] or 'model'}-{recipe.target}-{recipe.precision}"


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or os.path.exists(model)


def _without_path(model: str) -> str:
    return _model_name(model) if _is_path(model) else model


def _model_name(model: str) -> str:
    if _is_path(model):
        path = Path(os.path.abspath(model))
        return path.parent.name if path.name == "config.json" else path.name
    return model.removeprefix("builtin:").split("@")[0].rstrip("/").rpartition("/")[2]
