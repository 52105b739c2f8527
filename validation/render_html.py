"""A report as one HTML page that stands alone: no script, no network, light and dark."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calque.console import quality_tables, quality_title, size
from calque.validation.cells import Cell, ordered
from calque.validation.plots import LogScale, layer_plot, scientific, share

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(cells: Sequence[Cell]) -> str:
    """Return the page; every text that comes from a model or an error is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, sigma=scientific, seconds=_seconds, count=_count, words=lambda text: str(text).replace("_", " "))
    pages = [_page(number, cell) for number, cell in enumerate(ordered(cells), 1)]
    failed = sum(cell.status == "failed" for cell in cells)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(pages=pages, failed=failed)
    # A lone surrogate, as a damaged file name has, cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _page(number: int, cell: Cell) -> dict[str, Any]:
    """Return what the template shows of one artifact."""
    manifest, report = cell.manifest, cell.report
    run = [row for row in report.scenarios if row["status"] != "not_run"]
    return {
        "id": f"artifact-{number}",
        "cell": cell,
        "manifest": manifest,
        "report": report,
        "source": {**manifest.get("source", {}), **report.source},
        "proof": manifest.get("proof", {}),
        "run": len(run),
        "passed": sum(row["status"] == "passed" for row in run),
        "scenarios": _scenarios(cell),
        "layers": layer_plot(report.layers) if report.layers else None,
        "near_ties": [{**tie, "scenario": row["name"]} for row in report.scenarios for tie in row.get("near_ties") or ()],
        "quality": quality_tables(report.quality) if report.quality else [],
        "quality_title": quality_title(report.quality) if report.quality else "",
        "weights": _bars(report.weights, "bytes"),
        "weight_total": sum(group["bytes"] for group in report.weights),
        "files": [(name, count, manifest["files"].get(name)) for name, count in sorted(report.sizes.items())],
        "file_total": sum(report.sizes.values()),
        "stages": _stages(report.stages),
        "limits": _limits({**manifest.get("limits", {}), **report.limits}, bool(manifest.get("states"))),
        "command": f"calque validate {shlex.quote(str(cell.folder))}" if cell.folder else None,
    }


def _scenarios(cell: Cell) -> dict[str, Any]:
    measured = [row for row in cell.scenarios if row.get("worst_sigma") is not None]
    scale = LogScale.of([*(row["worst_sigma"] for row in measured), *(row["limit"] for row in measured)])
    rows = []
    for row in cell.scenarios:
        worst = row.get("worst_sigma")
        places = {"at": None if worst is None else scale.at(worst), "limit_at": scale.at(row["limit"])}
        rows.append({"reason": None, **row, "worst_sigma": worst, **places})
    return {"rows": rows, "ticks": scale.ticks}


def _bars(rows: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    most = max((row[key] for row in rows), default=0)
    return [{**row, "share": share(row[key], most)} for row in rows]


def _stages(stages: Sequence[Any]) -> list[dict[str, Any]]:
    slowest, largest = (max((getattr(stage, key) for stage in stages), default=0) for key in ("seconds", "peak_rss_bytes"))
    return [
        {
            "name": stage.name,
            "seconds": stage.seconds,
            "bytes": stage.peak_rss_bytes,
            "seconds_share": share(stage.seconds, slowest),
            "bytes_share": share(stage.peak_rss_bytes, largest),
        }
        for stage in stages
    ]


def _limits(limits: Mapping[str, Any], cached: bool) -> list[tuple[str, str]]:
    """Return what the artifact must not be asked to do, as people say it."""
    if not limits:
        return []
    padding = {"any": "on either side", "right": "on the right only", "none": "none: rows of one call have one length"}
    rows = [("padding", padding.get(limits.get("padding", ""), str(limits.get("padding"))))]
    if cached:
        rows.append(("prompts in pieces, several rows at once", "yes" if limits.get("batched_chunk") else "no"))
    rows.append(("longest row", f"{limits['max_length']:,} tokens" if limits.get("max_length") else "no limit of its own"))
    if limits.get("recompute_at"):
        rows.append(("cache", f"begun at or below {limits['recompute_at']:,} tokens, it is recomputed once its row grows past that"))
    return rows


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s" if value < 600 else f"{value / 60:.0f} min"


def _count(value: float | None) -> str:
    """Return a number of parameters as people read it: 4.59 M."""
    if value is None:
        return "–"
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"
