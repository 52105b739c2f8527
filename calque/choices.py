"""The values that a setting can take, for the recipe and for the command line; standard library alone."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-static", "int4", "fp8"]
Logits = Literal["all", "last", "dynamic"]
Requirement = Literal["build", "execution"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
LOGITS: tuple[Logits, ...] = get_args(Logits)
REQUIREMENTS: tuple[Requirement, ...] = get_args(Requirement)
