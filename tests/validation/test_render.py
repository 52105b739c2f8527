from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from calque.artifact import NUM_LOGITS_TO_KEEP
from calque.errors import ArtifactUnreadable
from calque.validation.cells import read_cells
from calque.validation.plots import LogScale, layer_plot, scientific
from calque.validation.render import RENDERERS, report
from calque.validation.render_markdown import LONGEST, escape
from tests.report_folder import FAILED, HOSTILE, REPORT, UNSUPPORTED, layer, write_failed, write_hostile, write_matrix, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of it all; raises where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """One artifact that passed, one that was rejected, and a run whose only cell left none."""
    return [write_report(tmp_path / "good"), write_failed(tmp_path / "bad.rejected"), write_matrix(tmp_path / "run", UNSUPPORTED)]


def test_json_merges_manifest_and_report(many: list[Path]) -> None:
    data = json.loads(report(many, "json"))
    assert data["schema"] == 1
    assert [found["status"] for found in data["artifacts"]] == ["passed", "failed", "failed"]
    assert data["artifacts"][0]["report"] == json.loads(json.dumps(REPORT.data()))
    assert data["artifacts"][0]["manifest"] == json.loads((many[0] / "manifest.json").read_text())
    assert data["artifacts"][2]["manifest"] is None
    assert data["artifacts"][2]["error"]["what"] == "onnxruntime cannot express int4"


def test_junit_has_a_suite_an_artifact_and_a_case_a_scenario(many: list[Path]) -> None:
    root = ET.fromstring(report(many, "junit"))
    assert root.tag == "testsuites"
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "7", "failures": "1", "errors": "1", "skipped": "2",
    }  # fmt: skip
    good, bad, run = root
    assert [(suite.get("name"), suite.get("tests")) for suite in root] == [("good", "3"), ("bad.rejected", "3"), ("llama-int4", "1")]
    assert [case.get("name") for case in good.iter("testcase")] == ["single-prompt", "ragged-left", "too-long"]
    assert good.findtext(".//failure") is None
    assert [skipped.get("message") for skipped in good.iter("skipped")] == ["needs rows of 9000 tokens"]
    [failure] = bad.iter("failure")
    assert "first diverges at stage 'cache_dynamic'" in (failure.text or "")
    assert "limit 7.0e-05 σ" in failure.get("message", "")
    [error] = run.iter("error")
    assert (error.get("type"), error.get("message")) == ("Unsupported", "onnxruntime cannot express int4")
    assert (error.text or "").splitlines()[1:] == ["  node one", "  node two", "Fix: use fp32"]


def test_junit_of_a_cell_that_was_left_out_is_skipped(tmp_path: Path) -> None:
    root = ET.fromstring(report([write_matrix(tmp_path, {"name": "int4", "status": "skipped"})], "junit"))
    assert [(case.get("name"), case[0].tag) for case in root.iter("testcase")] == [("convert", "skipped")]


def test_junit_survives_what_xml_cannot_hold(tmp_path: Path) -> None:
    root = ET.fromstring(report([write_hostile(tmp_path / "hostile")], "junit"))
    names = [case.get("name") for case in root.iter("testcase")]
    assert names[0] == HOSTILE.replace("\x1b", "\\x1b").replace("\x00", "\\x00")


def test_markdown_lists_failures_first(many: list[Path]) -> None:
    text = report(many, "markdown")
    assert text.startswith("## Calque: 2 of 3 failed\n")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.split("###")[0].splitlines()[4:] if line]
    assert rows == ["bad.rejected", "llama-int4", "good"]
    assert "**Unsupported** (exit 4): onnxruntime cannot express int4\n- node one\n- node two\n\nFix: use fp32" in text
    assert "| ragged-left | 3.2e-02 | 7.0e-05 | **failed**: row 1, position 3 (prefill)" in text
    assert text.index("first diverges") < text.index("| single-prompt |")
    assert "<details><summary>3 scenarios</summary>\n\n| scenario" in text
    assert "passed, 1 near ties" in text


def test_markdown_of_one_artifact_shows_its_table_at_once(many: list[Path]) -> None:
    text = report(many[:1], "markdown")
    assert text.startswith("### builtin:quill → onnxruntime, fp32: passed\n\nWorst 6.1e-06 σ, limit 7.0e-05 σ; 3 scenarios; 4.0 s.\n")
    assert "<details>" not in text


@pytest.mark.parametrize(
    ("raw", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("[x](http://y.z)", r"\[x\](http&#58;//y.z)"),
        ("two\nlines\x1b", "two lines"),
        ("`*_~$\\", r"\`\*\_\~\$" + "\\\\"),
        ("@someone #12", "&#64;someone &#35;12"),
        ("- item", r"\- item"),
        ("w" * 999, "w" * (LONGEST - 1) + "…"),
    ],
)
def test_markdown_shows_a_text_as_it_is_written(raw: str, escaped: str) -> None:
    assert escape(raw) == escaped


def test_markdown_table_of_a_hostile_model_keeps_its_columns(tmp_path: Path) -> None:
    text = report([write_hostile(tmp_path / "hostile")], "markdown")
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {5}


@pytest.fixture
def measured(tmp_path: Path) -> list[Path]:
    """An artifact that is faithful and not good enough, and whose layer has a hostile name."""
    row = {"layer": HOSTILE, "from": "int4", "to": "int8", "sensitivity": 3.7e-3}
    quality = {
        "text": "heldout.txt", "rows": 29, "tokens": 29442, "size_bytes": 3_461_583, "max_kl": 0.01, "max_size": None,
        "measured": [{"name": "weights alone", "kl_mean": 0.0111, "perplexity": 12.88, "original_perplexity": 12.76}],
        "sensitivity": [], "promoted": [row], "steps": [],
    }  # fmt: skip
    failures = ("quality: weights alone: mean KL 0.0111 nats, max_kl is 0.01",)
    return [write_report(tmp_path / "bad", replace(REPORT, quality=quality, failures=failures), FAILED)]


def test_every_format_shows_the_quality(measured: list[Path]) -> None:
    for name in ("markdown", "html", "junit"):
        text = RENDERERS[name](read_cells(measured))
        assert "29,442 tokens in 29 rows" in text, name
        assert "1.11e-02" in text, name
        assert "12.880" in text, name
        assert "3.70e-03" in text, name
        assert "mean KL 0.0111 nats" in text.replace("&#46;", "."), name
        assert "<script>alert" not in text, name


def test_junit_has_a_failed_case_where_the_model_is_not_good_enough(measured: list[Path]) -> None:
    suite = ET.fromstring(RENDERERS["junit"](read_cells(measured)))[0]
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None]
    assert failed == ["quality"]


@pytest.mark.parametrize("broken", [{"measured": [1]}, {"promoted": [{}]}, {"measured": [{"kl_mean": "x"}]}, [], {"max_kl": "y"}])
def test_a_quality_that_is_none_is_refused(tmp_path: Path, broken: Any) -> None:
    folder = write_report(tmp_path / "odd", replace(REPORT, quality=broken))
    with pytest.raises(ArtifactUnreadable, match="quality in the report"):
        read_cells([folder])


def test_html_needs_neither_network_nor_script(many: list[Path]) -> None:
    page = Elements(report(many, "html"))
    assert {tag for tag, _ in page.found} & {"script", "iframe", "img", "object", "embed", "base", "form"} == set()
    leads = {key: value for _, attributes in page.found for key, value in attributes.items() if key in ("src", "href") and value}
    assert all(value.startswith(("#", "data:,")) for value in leads.values()), leads
    assert "url(" not in report(many, "html")
    assert "@import" not in report(many, "html")


def test_html_shows_everything_that_is_known(many: list[Path]) -> None:
    text = " ".join(Elements(report(many[:1], "html")).text.split())
    for section in (
        "Verdict passed", "Notes", "What was converted", "Parity by scenario", "Parity by layer", "Near ties", "Passes",
        "Weights by layer", "Files", "Stages", "Limits", "Validate again",
    ):  # fmt: skip
        assert section in text
    for fact in (
        "builtin:quill", "0123", "llama, 4.59 M parameters, stored as bfloat16", "torch 2.13.0", "a runtime does not know this type",
        "6.1 × 10⁻⁶ σ", "2 of 2", "needs rows of 9000 tokens", "transpose_linear 42 lm_head.weight tied", "embeddings 4 MB 1 M",
        "model.onnx 5 B", "prove 0.8 s 547 MB", "on the right only", "4,096 tokens", f"calque validate {many[0]}",
    ):  # fmt: skip
        assert fact in text, fact
    assert "single-prompt 0 4 2.0 × 10⁻⁶" in text


def test_html_of_a_hostile_model_holds_no_element_of_its_own(tmp_path: Path, many: list[Path]) -> None:
    hostile = Elements(report([write_hostile(tmp_path / "hostile<i>")], "html"))
    assert {tag for tag, _ in hostile.found} <= {tag for tag, _ in Elements(report(many, "html")).found}
    assert not [key for _, attributes in hostile.found for key in attributes if key.startswith("on")]
    assert "alert('x')" in hostile.text
    quoted = [attributes.get("aria-label") or "" for _, attributes in hostile.found]
    assert any(HOSTILE.replace("\x00", "�") in label or HOSTILE in label for label in quoted)


def test_html_of_a_model_without_states_says_that_no_layer_was_compared(tmp_path: Path) -> None:
    from dataclasses import replace

    text = report([write_report(tmp_path / "encoder", replace(REPORT, layers=()), states=())], "html")
    assert "No layer was compared" in text
    assert "prompts in pieces" not in text
    assert NUM_LOGITS_TO_KEEP not in text


def test_every_format_of_the_command_line_has_a_renderer() -> None:
    from calque.choices import REPORT_FORMATS

    assert set(RENDERERS) == set(REPORT_FORMATS)


def test_a_log_scale_holds_what_it_was_made_of() -> None:
    scale = LogScale.of([5e-6, 7e-5, 0.0])
    assert (scale.low, scale.high) == (-6, -4)
    assert [scale.at(value) for value in (1e-6, 1e-5, 1e-4, 0.0, 1.0, None, 1e-9)] == [0.0, 50.0, 100.0, 0.0, 100.0, 100.0, 0.0]
    assert scale.ticks == [(0.0, "10⁻⁶"), (50.0, "10⁻⁵"), (100.0, "10⁻⁴")]
    assert len(LogScale.of([1e-9, 1e9]).ticks) <= 6
    assert LogScale.of([1e-5]) == LogScale(-6, -5)


def test_figures_are_written_as_powers_of_ten() -> None:
    assert [scientific(value) for value in (5.94e-6, 0.0, None, 12.0)] == ["5.9 × 10⁻⁶", "0", "–", "1.2 × 10¹"]


def test_a_layer_that_is_no_number_is_drawn_as_bad_at_the_top() -> None:
    plot = layer_plot([layer(0, "key", 1e-6), layer(3, "key", None), layer(0, "value", 9e-5)])
    points = plot["kinds"]["key"]["points"]
    assert [(point["x"], point["bad"]) for point in points] == [(25.0, False), (75.0, True)]
    assert points[1]["y"] == 0.0
    assert points[1]["text"] == "layer 3 key: no number"
    assert plot["kinds"]["value"]["points"][0]["bad"]
    assert plot["x_ticks"] == [(25.0, 0), (75.0, 3)]
