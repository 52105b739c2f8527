"""A report as JUnit XML, which CI servers import: a suite an artifact, a case a scenario."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from calque.console import quality_text
from calque.validation.cells import Cell

# What XML 1.0 has no way to write, not even escaped. Source: W3C, Extensible Markup Language 1.0, production Char.
_NO_CHARACTER = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(cells: Sequence[Cell]) -> str:
    """Return the document: ``failure`` for a scenario that failed, ``skipped`` for one not run, ``error`` where nothing was made."""
    root = ET.Element("testsuites", name="calque")
    for cell in cells:
        _add_suite(root, cell)
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.attrib[key]) for suite in root)))
    root.set("time", _seconds(sum(cell.seconds or 0 for cell in cells)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _add_suite(root: ET.Element, cell: Cell) -> None:
    suite = ET.SubElement(root, "testsuite", name=_text(cell.name))
    if cell.manifest:
        properties = ET.SubElement(suite, "properties")
        for key, value in (("model", cell.manifest["source"].get("id")), *((key, cell.manifest[key]) for key in ("target", "precision"))):
            ET.SubElement(properties, "property", name=key, value=_text(value))
    for row in cell.report.scenarios:
        _add_case(suite, cell, row)
    if cell.report.quality:
        _add_quality(suite, cell)
    for check in ("build", "execution") if cell.report.scenarios else ():
        found = (cell.manifest or {}).get("proof", {}).get(check, {})
        if found.get("status") == "not_run":
            case = ET.SubElement(suite, "testcase", name=check, classname=_text(cell.name), time=_seconds(0))
            ET.SubElement(case, "skipped", message=_text(found.get("reason") or "not run"))
    explained = any(row["status"] == "failed" for row in cell.report.scenarios) or bool(_quality_failures(cell))
    if cell.status == "skipped" and not cell.report.scenarios:
        case = ET.SubElement(suite, "testcase", name="convert", classname=_text(cell.name), time=_seconds(cell.seconds))
        ET.SubElement(case, "skipped", message=_text(cell.error["what"] if cell.error else "not run"))
    elif cell.status == "failed" and not explained:
        case = ET.SubElement(suite, "testcase", name="convert", classname=_text(cell.name), time=_seconds(cell.seconds))
        kind, what, text = _why(cell)
        ET.SubElement(case, "error", type=_text(kind), message=_text(what)).text = _text(text)
    for key, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(key, str(sum(1 for _ in suite.iter(tag))))
    suite.set("time", _seconds(cell.seconds))


def _add_case(suite: ET.Element, cell: Cell, row: Mapping[str, Any]) -> None:
    case = ET.SubElement(suite, "testcase", name=_text(row["name"]), classname=_text(cell.name), time=_seconds(row.get("seconds")))
    reason = str(row.get("reason") or "")
    if row["status"] == "failed":
        lines = [line for line in cell.report.failures if line.startswith((f"{row['name']}:", f"{row['name']} "))]
        ET.SubElement(case, "failure", type="ParityFailed", message=_text(reason)).text = _text("\n".join(lines or [reason]))
    elif row["status"] == "not_run":
        ET.SubElement(case, "skipped", message=_text(reason))


def _add_quality(suite: ET.Element, cell: Cell) -> None:
    """Add the case that fails where the model is not as good, or as small, as its recipe asks; it is said what was measured."""
    case = ET.SubElement(suite, "testcase", name="quality", classname=_text(cell.name), time=_seconds(0))
    if lines := _quality_failures(cell):
        ET.SubElement(case, "failure", type="ParityFailed", message=_text(lines[0])).text = _text("\n".join(lines))
    ET.SubElement(case, "system-out").text = _text(quality_text(cell.report.quality))


def _quality_failures(cell: Cell) -> list[str]:
    return [line for line in cell.report.failures if line.startswith("quality:")] if cell.report.quality else []


def _why(cell: Cell) -> tuple[str, str, str]:
    """Return the kind of a failure that no scenario explains, its message and its whole text."""
    if cell.error:
        lines = [cell.error["what"], *(f"  {line}" for line in cell.error["where"])]
        return cell.error["type"], cell.error["what"], "\n".join([*lines, f"Fix: {cell.error['fix']}"] if cell.error["fix"] else lines)
    checks = cell.failed_checks or ["failed"]
    return "ParityFailed", checks[0], "\n".join([*checks, *cell.report.failures])


def _text(value: object) -> str:
    """Return the value as text that XML can hold; other characters are written as Python escapes them."""
    return _NO_CHARACTER.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


def _seconds(value: float | None) -> str:
    return f"{value or 0:.3f}"
