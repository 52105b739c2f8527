"""docs/across.md is what docs/across.json says, and that says that every target holds the same integers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

from calque.validation.across import differing, not_finite

DOCS = Path(__file__).parents[2] / "docs"


def across() -> ModuleType:
    spec = importlib.util.spec_from_file_location("across", DOCS / "across.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_record_says() -> None:
    found = json.loads((DOCS / "across.json").read_text(encoding="utf-8"))
    assert (DOCS / "across.md").read_text(encoding="utf-8") == across().page(found), "run docs/across.py"


def test_every_target_holds_the_same_integers() -> None:
    for precision, beside in json.loads((DOCS / "across.json").read_text(encoding="utf-8")).items():
        named = [row["artifact"] for row in beside["integers"] if row["rows"]]
        assert named == [f"{artifact['target']} {precision}" for artifact in beside["artifacts"]]
        assert differing(beside["integers"]) == []
        assert not_finite(beside["answers"]) == []
