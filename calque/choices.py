"""The values that a setting can take, for the recipe and for the command line; standard library alone."""

from __future__ import annotations

from typing import Any, Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-static", "int4", "fp8"]
Logits = Literal["all", "last", "dynamic"]
Layout = Literal["flat", "transformers.js"]
Requirement = Literal["build", "execution"]
NarrowType = Literal["float16", "bfloat16"]
ReportFormat = Literal["markdown", "html", "junit", "json"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LOGITS: tuple[Logits, ...] = get_args(Logits)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
REQUIREMENTS: tuple[Requirement, ...] = get_args(Requirement)
REPORT_FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)

# Why a pass leaves what it was told to leave; other reasons are news to the user.
AS_ASKED = "kept as it is"

# The precisions that are a narrower type than float32, and that type as torch calls it.
NARROW: dict[str, NarrowType] = {"fp16": "float16", "bf16": "bfloat16"}
# The precisions whose weights are integers, or numbers of 8 bits: what makes them so of the pass that does.
QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "group": 0},
    "int8-static": {"bits": 8, "group": 0},
    "int4": {"bits": 4, "group": 32},
    # Numbers of 8 bits; what tokens are looked up in and chosen by keeps its digits.
    "fp8": {"bits": 8, "group": 0, "format": "e4m3", "embedding": "keep", "head": "keep"},
}
# More threads than any machine has cores: a number past it is a mistake, and each takes memory.
MOST_THREADS = 512
