"""report.html opened in headless Chromium, light, dark and at a phone's width. Left out of `make test`; to run it:

    apt-get install chromium
    .venv/bin/python -m pytest -m browser tests/browser --basetemp build/browser

The pictures that it takes then lie in build/browser.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from calque.validation.render import report
from tests.browser import chromium
from tests.report_folder import REPORT, UNSUPPORTED, layer, scenario, write_failed, write_hostile, write_matrix, write_report

BROWSER = chromium.find()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"no Chromium is installed: none of {', '.join(chromium.NAMES)} is on PATH"),
]

VIEWS = [(1280, "light"), (1280, "dark"), (375, "light"), (375, "dark"), (320, "light")]

# Text that is cut: wider than its box where nothing scrolls, or outside the page. Drawn text may reach over its own plot alone.
CLIPPED = """
(() => {
  const wide = document.documentElement.clientWidth, found = [];
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own) continue;
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (style.display === "none" || box.width === 0) continue;
    const drawn = element instanceof SVGElement;
    if (drawn && element.tagName !== "text") continue;
    const range = document.createRange();
    range.selectNodeContents(element);
    const outside = [...range.getClientRects()].some(line => line.right > wide + 1 || line.left < -1);
    const card = element.closest("section"), edge = card && card.getBoundingClientRect();
    const over = card && [...range.getClientRects()].some(line => line.right > edge.right + 1 || line.left < edge.left - 1);
    const cut = !drawn && element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1;
    if (outside || over || cut) found.push(element.tagName + ": " + element.textContent.trim().slice(0, 60));
  }
  return found;
})()
"""
# Sections, and the plots in them that are shown, by size.
EMPTY = """
[...document.querySelectorAll("section, .plot, .layers, .layers svg, .plot svg, pre, table")]
  .filter(element => getComputedStyle(element).display !== "none")
  .filter(element => { const box = element.getBoundingClientRect(); return box.width < 20 || box.height < 10; })
  .map(element => element.tagName + " " + element.className)
"""
# Two texts of one row of a plot that are printed over each other.
OVERLAPS = """
[...document.querySelectorAll(".row")].flatMap(row => {
  const boxes = [...row.querySelectorAll(":scope > span")].map(element => {
    const range = document.createRange(); range.selectNodeContents(element); return range.getBoundingClientRect(); });
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.width && b.width &&
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4).map(() => row.textContent.trim()));
})
"""
# Relative luminance of the text of each kind and of what lies behind it, as WCAG 2.2 defines it.
CONTRAST = """
(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = element => { for (; element; element = element.parentElement) {
    const color = channels(getComputedStyle(element).backgroundColor); if (color.length < 4 || color[3] > 0) return color; }
    return [255, 255, 255]; };
  return [...document.querySelectorAll("main :is(p, li, dt, dd, td, th, span, h1, h2, text, a, code)")]
    .map(element => { const style = getComputedStyle(element);
      const front = light(channels(element.tagName === "text" ? style.fill : style.color)), back = light(behind(element));
      return [(Math.max(front, back) + .05) / (Math.min(front, back) + .05), element.textContent.trim().slice(0, 40)]; })
    .filter(([ratio]) => ratio < 4.5);
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give a report of each kind, written to a file."""
    folder = tmp_path_factory.mktemp("reports")
    deep = tuple(layer(number, kind, 1e-6 * 1.05**number) for number in range(48) for kind in ("key", "value"))
    weights = tuple({"name": f"model.layers.{i}", "layer": i, "bytes": 10**8 + i, "parameters": 10**8} for i in range(48))
    rows = (*REPORT.scenarios, *(scenario(f"past-window-{2**i}-left", 10.0 ** (i - 9)) for i in range(6)))
    large = replace(REPORT, layers=deep, weights=weights, scenarios=rows, sizes={f"file-{i}": 10**i for i in range(9)})
    folders = {
        "passed": [write_report(folder / "quill")],
        "large": [write_report(folder / "large", large)],
        "hostile": [write_hostile(folder / "hostile")],
        "several": [write_report(folder / "good"), write_failed(folder / "bad.rejected"), write_matrix(folder / "run", UNSUPPORTED)],
    }
    for name, given in folders.items():
        (folder / f"{name}.html").write_text(report(given, "html"), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in folders}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    """Give one page of a browser of our own."""
    assert BROWSER is not None
    with chromium.page(BROWSER, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "theme"), VIEWS)
@pytest.mark.parametrize("name", ["passed", "large", "hostile", "several"])
def test_report_page_is_whole_and_readable(
    browser: chromium.Page, pages: dict[str, Path], tmp_path: Path, name: str, width: int, theme: str
) -> None:
    browser.requests.clear()
    browser.complaints.clear()
    url = pages[name].as_uri()
    browser.open(url, width, 900, theme)
    browser.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true; })")
    browser.screenshot(tmp_path / f"{name}-{width}-{theme}.png")
    assert browser.complaints == []
    assert [request for request in browser.requests if request != url and not request.startswith("data:")] == []
    assert browser.evaluate("document.querySelectorAll('section').length") >= 10
    assert browser.evaluate(EMPTY) == []
    assert browser.evaluate(CLIPPED) == []
    assert browser.evaluate(OVERLAPS) == []
    assert browser.evaluate(CONTRAST) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    dark = browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark, sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 300) == (theme == "dark", theme == "dark")


def test_report_page_is_the_same_with_scripts_off(browser: chromium.Page, pages: dict[str, Path]) -> None:
    pictures = []
    for off in (False, True):
        browser.call("Emulation.setScriptExecutionDisabled", value=off)
        browser.open(pages["several"].as_uri(), 900, 900, "light")
        pictures.append(browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert pictures[0] == pictures[1]


def test_the_measurements_find_what_is_wrong(browser: chromium.Page, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text(
        "<main><section style='width: 200px; background: #fff'>"
        "<p style='white-space: nowrap'>a text that is longer than its card is wide</p>"
        "<p style='color: #ddd'>pale</p><pre style='height: 0; margin: 0'></pre>"
        "<div class='row' style='position: relative'><span style='position: absolute'>one</span><span>two</span></div></section></main>"
        "<script>console.error('complaint'); fetch('http://127.0.0.1:9/outside')</script>",
        encoding="utf-8",
    )
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(page.as_uri(), 375, 900, "light")
    assert browser.evaluate(CLIPPED) == ["P: a text that is longer than its card is wide"]
    assert browser.evaluate(EMPTY) == ["PRE "]
    assert browser.evaluate(OVERLAPS) == ["onetwo"]
    assert [text for _, text in browser.evaluate(CONTRAST)] == ["pale"]
    assert any("complaint" in text for text in browser.complaints)
    assert "http://127.0.0.1:9/outside" in browser.requests
