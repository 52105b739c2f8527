"""recipes/recipe.schema.json is the JSON schema of a recipe, for editors: run this file after changing a key, target, pass or option.

It is what pydantic says of `Recipe`, and besides it the targets and passes of Calque's own, with the options of each.
A test holds the two equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from calque import passes, targets
from calque.recipe import Recipe
from calque.validation.scenarios import NAMES

FILE = Path(__file__).parents[1] / "recipes" / "recipe.schema.json"

SIZE = r"^\s*(\d+(\.\d+)?)\s*([KMGTkmgt]?[Ii]?)[Bb]?\s*$"


def schema() -> dict[str, Any]:
    """Return the schema that editors check a recipe with."""
    found: dict[str, Any] = Recipe.model_json_schema()
    found["description"] = found["description"].partition("\n")[0]  # what making one in Python raises is no editor's affair
    keys, parts = found["properties"], found["$defs"]
    axes = parts["Matrix"]["properties"]
    for listed in (axes[axis]["anyOf"][0] for axis in axes):
        listed["uniqueItems"] = True
    for name in (keys["target"], axes["target"]["anyOf"][0]["items"]):
        name["enum"] = targets.built_in()
    parts["Matrix"]["minProperties"] = 1
    keys["passes"]["anyOf"][0]["items"] = {"$ref": "#/$defs/Pass"}
    parts["Pass"] = _pass()
    _one_of(keys["max_memory"]["anyOf"], "string")["pattern"] = SIZE
    _one_of(parts["Parity"]["properties"]["max_size"]["anyOf"], "string")["pattern"] = SIZE
    named = _one_of(parts["Parity"]["properties"]["scenarios"]["anyOf"], "array")
    named.update(minItems=1, items={"type": "string", "pattern": f"^({NAMES.pattern})$"})
    for dimension in ("batch_size", "sequence_length"):
        for number in parts["Dims"]["properties"][dimension]["prefixItems"]:
            number["minimum"] = 1
    # A key that the matrix lists need not be given besides.
    needed = [
        {"anyOf": [{"required": [key]}, {"required": ["matrix"], "properties": {"matrix": {"required": [key]}}}]}
        for key in found.pop("required")
    ]
    found["allOf"] = [*needed, *(_options(name) for name in targets.built_in())]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _one_of(branches: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(branch for branch in branches if branch.get("type") == kind)


def _pass() -> dict[str, Any]:
    """Return the schema of an entry under ``passes``: a name, or a name with its options."""
    options = {name: _fields(passes.find(name)) for name in passes.built_in()}
    with_options = {"type": "object", "properties": options, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"enum": passes.built_in()}, with_options]}


def _options(target: str) -> dict[str, Any]:
    """Return that ``options`` are those of the target, where it is the recipe's."""
    names = {"properties": {"target": {"const": target}}, "required": ["target"]}
    return {"if": names, "then": {"properties": {"options": {**_fields(targets.load(target)), "type": "object"}}}}


def _fields(cls: type[Any]) -> dict[str, Any]:
    """Return the schema of the options that are the fields of a class; all of them have defaults."""
    found = TypeAdapter(cls).json_schema()
    return {**found, "type": ["object", "null"], "description": (cls.__doc__ or "").replace("``", "`"), "additionalProperties": False}


def text() -> str:
    """Return the file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
