"""The comparison compares: the case, what is taken from it, and the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.padding.case import LENGTHS, SHAPE, SIDES, STEPS, Call, Error, calls, errors, own, rows
from benchmarks.padding.models import STATE, Graphs, drive
from benchmarks.padding.tables import Outcome, table, why

LIMIT = 5e-5


class Recorder:
    """Answers with the tokens themselves."""

    def answer(self, call: Call) -> NDArray[np.float32]:
        """Return each new column's token, position and number of tokens that its row has."""
        seen = np.broadcast_to(call.mask.sum(axis=1, keepdims=True), call.ids.shape)
        return np.stack([call.ids, call.positions, seen], axis=-1).astype(np.float32)


@pytest.mark.parametrize("side", SIDES)
def test_a_row_gets_its_own_tokens_whatever_the_side(side: str) -> None:
    """Positions count them from 0, and the mask of each step shows all so far."""
    for tokens, length, answer in zip(rows(), LENGTHS, drive(Recorder(), side), strict=True):
        assert answer[:, 0].tolist() == tokens.tolist()
        assert answer[:, 1].tolist() == list(range(length + STEPS))
        assert answer[length:, 2].tolist() == list(range(length + 1, length + STEPS + 1))


def test_rows_are_padded_on_the_side() -> None:
    """Padding is token 0 where the mask is 0, and steps come after it."""
    left, right = (next(iter(calls(side))) for side in SIDES)
    assert left.mask[1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert right.mask[1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert not right.ids[1, 5:].any()
    assert [call.mask.shape[1] for call in calls("right")] == list(range(9, 18))


def test_an_error_is_that_of_the_prompt_or_of_the_steps() -> None:
    """In units of the row's own deviation; what is not a number is as wrong as can be."""
    expected = [np.tile(np.array([-2.0, 2.0], np.float32), (length + STEPS, 1)) for length in LENGTHS]
    answers = [array.copy() for array in expected]
    answers[0][LENGTHS[0] - 1, 0] += 1.0
    answers[1][LENGTHS[1], 1] -= 4.0
    answers[2][0, 0] = np.nan
    found = errors(answers, expected)
    assert found[:2] == [Error(0.5, 0.0), Error(0.0, 2.0)]
    assert Outcome("tool", "left", (found[2],)).is_wrong(LIMIT)


@pytest.mark.parametrize("name", ["past_key_values.3.key", "present.3.key", "input.past_key_values.layers.3.keys"])
def test_a_state_is_found_by_its_layer(name: str) -> None:
    """Tools name it each in their way."""
    found = STATE.search(name)
    assert found is not None
    assert found.groups() == ("3", "key")


def test_graphs_hand_on_the_cache(tmp_path: Path) -> None:
    """Logits are the largest number in the cache: of all tokens before, padding included, as this graph knows no mask."""
    past, present, ids = "past_key_values.0.value", "present.0.value", "input_ids"
    block = [len(LENGTHS), SHAPE.kv_heads, -1, SHAPE.head_dim]
    nodes = [
        helper.make_node("Cast", [ids], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "columns"], ["column"]),
        helper.make_node("Expand", ["column", "ones"], ["new"]),
        helper.make_node("Concat", [past, "new"], [present], axis=2),
        helper.make_node("ReduceMax", [present, "middle"], ["rows"], keepdims=1),
        helper.make_node("Reshape", ["rows", "flat"], ["row"]),
        helper.make_node("Shape", ["floats"], ["size"]),
        helper.make_node("Concat", ["size", "one"], ["shape"], axis=0),
        helper.make_node("Expand", ["row", "shape"], ["logits"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([len(LENGTHS), 1, -1, 1]), "columns"),
        numpy_helper.from_array(np.array([1, SHAPE.kv_heads, 1, SHAPE.head_dim]), "ones"),
        numpy_helper.from_array(np.array([1, 2, 3]), "middle"),
        numpy_helper.from_array(np.array([len(LENGTHS), 1, 1]), "flat"),
        numpy_helper.from_array(np.array([1]), "one"),
    ]
    inputs = [
        helper.make_tensor_value_info(ids, TensorProto.INT64, [len(LENGTHS), "columns"]),
        helper.make_tensor_value_info(past, TensorProto.FLOAT, [*block[:2], "past", block[3]]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [len(LENGTHS), "columns", 1]),
        helper.make_tensor_value_info(present, TensorProto.FLOAT, [*block[:2], "total", block[3]]),
    ]
    graph = helper.make_graph(nodes, "cache", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "model.onnx")
    for tokens, answer in zip(rows(), drive(Graphs(tmp_path / "model.onnx"), "left"), strict=True):
        assert answer[-1, 0] == tokens.max()


def test_the_table_shows_who_is_wrong_and_who_refuses() -> None:
    """What rounding does not explain is bold; each has its reason once."""
    sound, wrong = Error(1e-6, 2e-6), Error(3e-6, 1.25)
    outcomes = [
        Outcome("ours", "left", (sound,) * 3),
        Outcome("strict", "left", refused="on the right alone"),
        Outcome("theirs", "left", (sound, wrong, sound)),
        Outcome("broken", "left", failed="exit code 1: out of memory"),
    ]
    lines = table(outcomes, LIMIT)[2:]
    assert lines[0] == "| ours | 1.0e-06 | 2.0e-06 | 1.0e-06 | 2.0e-06 | 1.0e-06 | 2.0e-06 | right |"
    assert lines[1] == "| strict | – | – | – | – | – | – | refused |"
    assert lines[2] == "| theirs | 1.0e-06 | 2.0e-06 | 3.0e-06 | **1.2** | 1.0e-06 | 2.0e-06 | **wrong** |"
    assert lines[3].endswith("| failed |")
    assert why(outcomes, {"theirs": "it forgets"}, LIMIT) == [
        "## Why",
        "",
        "- strict: padding on the left: `on the right alone`.",
        "- theirs: it forgets.",
        "- broken: padding on the left: `exit code 1: out of memory`.",
        "",
    ]


def test_own_takes_no_padding() -> None:
    """Of the prompts' columns only those that hold a row's tokens count."""
    answers = [np.full((3, max(LENGTHS), 1), np.nan, np.float32), *(np.ones((3, 1, 1), np.float32) for _ in range(STEPS))]
    mask = next(iter(calls("left"))).mask
    answers[0][mask.astype(bool)] = 1
    assert all((row == 1).all() and len(row) == length + STEPS for row, length in zip(own("left", answers), LENGTHS, strict=True))
