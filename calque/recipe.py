"""A recipe: everything that decides what a conversion makes, checked before any work begins."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StrictBool,
    StrictInt,
    StrictStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from calque.choices import MOST_THREADS, NARROW, QUANTIZED, Layout, Logits, Precision, Requirement
from calque.recipe_errors import Origin, Problem, problems_besides, problems_of, recipe_error
from calque.strict_yaml import read_document

# Settings of the machine that converts. They change how long it takes, never a byte of what comes out.
_MACHINE_SETTINGS = frozenset({"max_memory", "threads", "require", "matrix"})

_AXES = ("model", "target", "precision")
# More would take weeks, and listing them all would take the memory first.
MOST_CELLS = 1000

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


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted(value for value, count in Counter(values).items() if count > 1):
        raise ValueError(f"must name each once; named again: {', '.join(twice)}")
    return values


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
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Dims(_Settings):
    """How large each dynamic dimension gets: smallest, typical, largest; ``max_length`` bounds prompt and answer together."""

    batch_size: Range = (1, 1, 8)
    """Rows of a call: [min, typical, max]."""
    sequence_length: Range = (1, 128, 2048)
    """Tokens of a call: [min, typical, max]."""
    max_length: Count | None = None
    """Most tokens of prompt and answer together; the artifact refuses more."""


class Calibration(_Settings):
    """The text that the model is measured on, for weights that are rounded by what they read and for activation ranges."""

    text: Name
    """File with the text, relative to the folder that `calque` runs in."""
    samples: Count = 128
    """How many pieces of it are measured at most, each of 256 tokens."""


class Parity(_Settings):
    """Which scenarios the artifact must pass, all that its limits allow or those named; and how good the model must still be."""

    scenarios: Annotated[Literal["all"] | tuple[Name, ...], BeforeValidator(_scenarios)] = "all"
    """all, or a list of names such as single-prompt and ragged-left."""
    text: Name | None = None
    """File with a text that the model's quality is measured on, relative to the folder that `calque` runs in; left out: random tokens."""
    max_kl: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] | None = None
    """Largest mean KL divergence from the original model, in nats per position; layers are promoted to more bits until it holds."""
    max_size: Bytes | None = None
    """Most bytes of the files with graph and weights: 500MB, or a number of bytes."""
    sensitivity: StrictBool = False
    """Measure what the model loses by each layer's integers alone."""


class Matrix(_Settings):
    """Axes of a cartesian product; each cell is a recipe of its own."""

    model: Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_distinct)] | None = None
    """Models, each as under the key model."""
    target: Annotated[tuple[TargetName, ...], Field(min_length=1), AfterValidator(_distinct)] | None = None
    """Targets, each as under the key target."""
    precision: Annotated[tuple[Precision, ...], Field(min_length=1), AfterValidator(_distinct)] | None = None
    """Precisions, each as under the key precision."""

    @model_validator(mode="after")
    def _has_cells(self) -> Matrix:
        axes = [cells for axis in _AXES if (cells := getattr(self, axis))]
        if not axes:
            raise ValueError("must list something under model, target or precision")
        if (count := math.prod(len(cells) for cells in axes)) > MOST_CELLS:
            raise ValueError(f"has {count} cells; the most are {MOST_CELLS}")
        return self


def _default_precision(settings: dict[str, Any]) -> Precision:
    return "fp16" if settings.get("target") == "tensorrt" else "fp32"


class Recipe(_Settings):
    """What to convert, to what, how, and what must be proved. Frozen; unknown keys are refused.

    Raises:
        RecipeError: every problem at once, with the nearest known key.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of the format of recipes."""
    model: Name
    """What to convert: org/name, org/name@revision, a folder, or builtin:NAME."""
    task: Name | None = None
    """Optimum's name of the task, such as text-generation-with-past; left out: what the model's config says."""
    target: TargetName
    """Runtime to convert for; `calque targets` lists them."""
    precision: Precision = Field(default_factory=_default_precision)
    """What the weights are stored in; left out: fp32, for tensorrt fp16."""
    dims: Dims = Dims()
    """How large each dynamic dimension gets."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The target's own options, as `--set KEY=VALUE`."""
    passes: tuple[PassEntry, ...] | None = None
    """Passes in order, each a name or {name: {option: value}}; left out: the target's list; []: none."""
    calibration: Calibration | None = None
    """Text that the model is measured on before it is rounded."""
    max_memory: Bytes | None = None
    """Memory that converting may use: 2GB, 512MiB, or a number of bytes."""
    parity: Parity = Parity()
    """What must be proved."""
    matrix: Matrix | None = None
    """Every combination of these is a conversion of its own, in a folder {model}-{target}-{precision}."""
    logits: Logits = "all"
    """Which positions get logits; dynamic adds the input num_logits_to_keep."""
    layout: Layout = "flat"
    """Which names the model's files have; transformers.js: onnx/model.onnx and onnx/model.onnx_data."""
    random_weights: StrictBool = False
    """Seeded random weights in place of the model's own: its config is enough."""
    trust_remote_code: StrictBool = False
    """Run the code that the model's repository brings."""
    require: Requirement | None = None
    """Exit 5 where the artifact could not be built, or not be executed, on this machine."""
    threads: Annotated[StrictInt, Field(ge=0, le=MOST_THREADS)] = 0
    """Threads to compute with; 0 lets the runtime choose."""

    @model_validator(mode="before")
    @classmethod
    def _first_cell(cls, value: object) -> object:
        """Take a key that only the matrix gives from its first cell."""
        matrix = value.get("matrix") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(matrix, Mapping):
            return value
        firsts = {key: axis[0] for key in ("model", "target") if isinstance(axis := matrix.get(key), list | tuple) and axis}
        return {**firsts, **value}

    @model_validator(mode="wrap")
    @classmethod
    def _all_problems(cls, value: Any, handler: ModelWrapValidatorHandler[Recipe], info: ValidationInfo) -> Recipe:
        """Raise RecipeError with all that is wrong: in the schema, in the names, and in what the cells of a matrix would be called."""
        origin, names = info.context or (Origin("the recipe"), None)

        def look_up(recipe: Recipe) -> list[Problem]:
            shared = [(("matrix",), f"several cells would be written to {name}") for name in _shared_folders(recipe._cells())]
            return [*(names(recipe) if names else ()), *shared]

        try:
            recipe = handler(value)
        except ValidationError as error:
            found = problems_of(error, cls, origin)
            if isinstance(value, Mapping):
                found += [origin.placed(*problem) for problem in problems_besides(error, value, handler, look_up)]
            raise origin.error(found) from error
        if problems := look_up(recipe):
            raise origin.error(origin.placed(*problem) for problem in problems)
        return recipe

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any] | None = None, names: LookUp | None = None) -> Recipe:
        """Return the recipe in a YAML file; ``overrides`` are flags: they replace top-level keys, axes of the matrix too.

        ``names`` gives the problems of what the schema leaves open, each with its place.

        Raises:
            RecipeError: every problem at once, with the line of each and the nearest known key.
        """
        document = read_document(path)
        if not isinstance(document.data, dict):
            found = "nothing" if document.data is None else type(document.data).__name__
            raise recipe_error([f"line 1: a recipe is a mapping of keys to values; found {found}"], str(path))
        data, flags = {**document.data}, dict(overrides or {})
        matrix = data.get("matrix")
        if isinstance(matrix, dict) and set(matrix) & set(flags):
            data["matrix"] = {axis: cells for axis, cells in matrix.items() if axis not in flags} or None
        for key in ("options", "parity", "dims"):
            if isinstance(data.get(key), dict) and isinstance(flags.get(key), dict):
                flags[key] = {**data[key], **flags[key]}
        return cls.model_validate({**data, **flags}, context=(Origin(str(path), document, frozenset(flags)), names))

    @classmethod
    def of(cls, settings: Mapping[str, Any], origin: str = "the command line", names: LookUp | None = None) -> Recipe:
        """Return the recipe that plain settings describe; ``names`` as in `read`.

        Raises:
            RecipeError: every problem at once, with the nearest known key.
        """
        return cls.model_validate(dict(settings), context=(Origin(origin, flags=frozenset(settings)), names))

    def expand(self) -> dict[str, Recipe]:
        """Return every cell of the matrix by the name of its folder; the recipe alone where there is no matrix."""
        return {default_folder(cell): cell for cell in self._cells()}

    def _cells(self) -> list[Recipe]:
        if self.matrix is None:
            return [self]
        given = {name: getattr(self, name) for name in self.model_fields_set - {"matrix", "schema_version"}}
        axes = {axis: cells for axis in _AXES if (cells := getattr(self.matrix, axis))}
        chosen = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
        return [Recipe(**_cell(given, values)) for values in chosen]

    def as_manifest(self) -> dict[str, Any]:
        """Return the recipe as manifest.json records it: defaults written out, no paths, no settings of the machine."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(_MACHINE_SETTINGS))
        data["model"] = _without_path(self.model)
        if self.calibration:
            data["calibration"]["text"] = Path(self.calibration.text).name
        if self.parity.text:
            data["parity"]["text"] = Path(self.parity.text).name
        return data


def _cell(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one cell; where the matrix names precisions, those that round nothing are told nothing of rounding."""
    settings = {**given, **values}
    if "precision" in values and values["precision"] not in QUANTIZED:
        settings.pop("calibration", None)
        if "options" in settings:
            settings["options"] = {key: value for key, value in settings["options"].items() if not key.startswith("quantize_")}
    return settings


LookUp = Callable[[Recipe], Iterable[Problem]]


def unbuilt_settings(recipe: Recipe) -> list[str]:
    """Return one line for each setting that the schema knows and this version cannot follow."""
    lines = []
    if recipe.calibration is not None and recipe.precision in ("fp32", *NARROW):
        lines.append(f"calibration  {recipe.precision} rounds nothing that a text could be measured for")
    if recipe.matrix is not None:
        lines.append("matrix  one conversion makes one artifact; convert each recipe that Recipe.expand() gives")
    return lines


def _shared_folders(cells: Sequence[Recipe]) -> list[str]:
    """Return the folders that more than one cell would be written to."""
    return sorted(name for name, count in Counter(map(default_folder, cells)).items() if count > 1)


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
