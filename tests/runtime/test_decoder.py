from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from calque.artifact import Artifact, Limits
from calque.errors import TargetUnavailable, Unsupported, UsageError
from calque.runtime import OnnxRuntimeSession
from calque.runtime.decoder import ROOM, Decoder
from calque.runtime.generate import GreedySequence
from calque.states import Update
from tests.runtime.cached import SIZE, SLOTS, VOCABULARY, table, write_grouped, write_static
from tests.runtime.counting import Counting, write_counting

RAGGED = np.array([[3, 5, 9, 1], [7, 2, 0, 0], [4, 0, 0, 0]])
RAGGED_MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def by_hand(artifact: Artifact, calls: list[tuple[Any, Any]]) -> list[Any]:
    """The logits of each call where the states are handed on through the plain session."""
    session, rows = OnnxRuntimeSession(artifact), len(calls[0][0])
    states: dict[str, Any] = {state.input: np.zeros((rows, 1, 0, SIZE), np.float32) for state in artifact.states}
    whole, logits = np.zeros((rows, 0), np.int64), []
    for ids, mask in calls:
        whole = np.concatenate([whole, mask], axis=1)
        outputs = session("model", {"input_ids": np.array(ids), "attention_mask": whole, **states})
        states = {state.input: outputs[state.output] for state in artifact.states}
        logits.append(outputs["logits"])
    return logits


def calls_of(steps: int) -> list[tuple[Any, Any]]:
    ones = np.ones((3, 1), np.int64)
    return [(RAGGED, RAGGED_MASK), *((np.full((3, 1), (7 * step + 1) % VOCABULARY), ones) for step in range(steps))]


@pytest.mark.parametrize("made", [{}, {"window": 3}, {"reads_length": True}], ids=["shared", "shared-window", "handed-on"])
def test_a_batch_gives_the_logits_of_states_handed_on_by_hand(tmp_path: Path, made: dict[str, Any]) -> None:
    artifact = write_grouped(tmp_path, **made)
    calls = calls_of(ROOM + 8)  # further than a buffer reaches at first
    expected = by_hand(artifact, calls)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact), rows=3)
    for _ in range(2):  # and again, from the beginning
        for (ids, mask), logits in zip(calls, expected, strict=True):
            valid = mask.astype(bool)
            assert np.array_equal(decoder(np.array(ids), mask)[valid], logits[valid])
        assert decoder.lengths.tolist() == [4 + ROOM + 8, 2 + ROOM + 8, 1 + ROOM + 8]
        decoder.reset()


@pytest.mark.parametrize(("reads_length", "same"), [(False, True), (True, False)])
def test_one_buffer_is_past_and_present_where_the_graph_allows_it(tmp_path: Path, reads_length: bool, same: bool) -> None:
    artifact = write_grouped(tmp_path, reads_length)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact))
    decoder(np.array([[1, 2, 3]]))
    assert type(decoder._states).__name__ == ("_Shared" if same else "_HandedOn")
    if same:
        [key] = [buffer for name, buffer in decoder._states._buffers.items() if name.endswith("key")]  # type: ignore[union-attr]
        assert key.shape[2] >= 3
        assert np.array_equal(key[0, 0, :3], table(SIZE, 4)[[1, 2, 3]])
        decoder.reset()  # a NaN that stayed would come through masks
        assert not key.any()


def test_reserved_room_is_used_without_a_new_buffer(tmp_path: Path) -> None:
    artifact = write_grouped(tmp_path)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact))
    decoder.reserve(2 * ROOM)
    before = [id(buffer) for buffer in decoder._states._buffers.values()]  # type: ignore[union-attr]
    decoder(np.ones((1, 2 * ROOM), np.int64))
    assert [id(buffer) for buffer in decoder._states._buffers.values()] == before  # type: ignore[union-attr]
    decoder(np.ones((1, 1), np.int64))
    assert [id(buffer) for buffer in decoder._states._buffers.values()] != before  # type: ignore[union-attr]


def test_logits_and_states_are_views_of_what_onnxruntime_holds(tmp_path: Path) -> None:
    artifact = write_counting(tmp_path)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact))
    for ids in ([[3, 5]], [[7]]):
        assert not decoder(np.array(ids)).flags.owndata
    assert not any(array.flags.owndata for array in decoder._states._arrays.values())  # type: ignore[union-attr]


def test_a_static_cache_is_written_in_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """TensorScatter warns where it copies: so it does with past and present apart, and not in the decoder."""
    artifact = write_static(tmp_path)
    session = OnnxRuntimeSession(artifact)
    session._open["model"] = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    decoder = Decoder(artifact, session)
    assert not decoder(np.array([[3, 5]])).flags.owndata
    decoder(np.array([[7]]))
    assert "copying past_cache" not in capfd.readouterr().err
    past = {state.input: np.zeros((1, 1, SLOTS, SIZE), np.float32) for state in artifact.states}
    one = {"input_ids": np.array([[3]]), "position_ids": np.array([[0]]), "write_indices": np.array([0])}
    session("model", {**one, "kv_lengths": np.array([1], np.int32), **past})
    assert "copying past_cache" in capfd.readouterr().err


def static_logits(rows: list[list[int]], new: Any) -> Any:
    """What the static graph gives for the tokens ``new`` of rows that hold ``rows`` after them."""
    keys = table(SIZE, 1).sum(axis=1)
    scores = [sum((slot + 1) * keys[token] for slot, token in enumerate(row)) for row in rows]
    return table(VOCABULARY, 2)[np.array(new)] + np.array(scores)[:, None, None]


@pytest.mark.parametrize("bound", [True, False])
def test_rows_of_a_static_cache_fill_their_slots_from_the_first(tmp_path: Path, bound: bool) -> None:
    artifact = write_static(tmp_path)
    session = OnnxRuntimeSession(artifact)
    # A session of another runtime hands the slots on.
    decoder = Decoder(artifact, session if bound else session.__call__, rows=3)
    for _ in range(2):
        first = decoder(RAGGED, RAGGED_MASK)
        assert np.allclose(first, static_logits([[3, 5, 9, 1], [7, 2], [4]], RAGGED), atol=1e-5)
        # Padding took no slot: the next token of each row goes where its own tokens end.
        second = decoder(np.array([[8], [6], [11]]))
        assert np.allclose(second, static_logits([[3, 5, 9, 1, 8], [7, 2, 6], [4, 11]], [[8], [6], [11]]), atol=1e-5)
        assert decoder.lengths.tolist() == [5, 3, 2]
        decoder.reset()


@pytest.mark.parametrize("update", ["replace", "in_place"])
def test_a_recurrent_state_goes_along_with_a_static_cache(tmp_path: Path, update: Update) -> None:
    artifact = write_static(tmp_path, recurrent=update)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact), rows=2)
    for _ in range(2):
        rows: list[list[int]] = [[], []]
        for new in ([[3, 5], [7, 2]], [[4], [6]], [[1], [9]]):
            rows = [row + more for row, more in zip(rows, new, strict=True)]
            expected = static_logits(rows, new) + np.array([sum(row) for row in rows])[:, None, None]
            assert np.allclose(decoder(np.array(new)), expected, atol=1e-4)
        decoder.reset()


def test_padding_uses_no_slot_of_a_static_cache(tmp_path: Path) -> None:
    artifact = write_static(tmp_path)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact))
    decoder(np.array([[3, 0, 0, 0]]), np.array([[1, 0, 0, 0]]))
    row = [3]
    for token in range(5, 5 + SLOTS - 1):
        row.append(token)
        assert np.allclose(decoder(np.array([[token]])), static_logits([row], [[token]]), atol=1e-5)
    assert decoder.lengths.tolist() == [SLOTS]


def test_a_static_cache_ends(tmp_path: Path) -> None:
    artifact = write_static(tmp_path)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact), rows=1)
    decoder(np.ones((1, SLOTS), np.int64))
    with pytest.raises(Unsupported, match=f"max_length is {SLOTS}"):
        decoder(np.array([[1]]))
    unlimited = replace(artifact, limits=Limits(padding="right"))
    decoder = Decoder(unlimited, OnnxRuntimeSession(unlimited), rows=1)
    with pytest.raises(Unsupported, match=f"fill {SLOTS + 1} slots"):
        decoder(np.ones((1, SLOTS + 1), np.int64))


def test_a_static_cache_is_driven_greedily_until_it_is_full(tmp_path: Path) -> None:
    artifact = write_static(tmp_path)
    prompt = [3, 5]
    sequence = GreedySequence(artifact, OnnxRuntimeSession(artifact), [*prompt])
    sequence.warm_up()
    new = [*sequence.tokens(20)]
    assert len(prompt) + len(new) == SLOTS + 1  # the last is never fed
    held = list(prompt)
    for token in new:
        assert token == int(static_logits([held], [held[-1:]])[0, -1].argmax())
        held.append(token)


def test_logits_of_all_positions_come_where_a_row_ends_in_padding(tmp_path: Path) -> None:
    artifact = write_counting(tmp_path, Counting(keep_input=True))
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact), rows=2)
    assert decoder(np.array([[4, 5], [6, 0]]), np.array([[1, 1], [1, 0]])).shape[1] == 2
    assert decoder(np.array([[6], [7]])).shape[1] == 1


def test_left_padding_takes_no_position(tmp_path: Path) -> None:
    artifact = write_counting(tmp_path)
    asked = []
    session = OnnxRuntimeSession(artifact)

    def spy(graph: str, inputs: Any) -> Any:
        asked.append(inputs["position_ids"].tolist())
        return session(graph, inputs)

    decoder = Decoder(artifact, spy, rows=2)  # any session will do, a plug-in's too
    decoder(np.array([[4, 5, 6], [0, 0, 7]]), np.array([[1, 1, 1], [0, 0, 1]]))
    decoder(np.array([[7], [8]]))
    assert asked == [[[0, 1, 2], [0, 0, 0]], [[3], [1]]]


def test_what_the_artifact_does_not_take_is_refused(tmp_path: Path) -> None:
    artifact = write_grouped(tmp_path)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact), rows=2)
    with pytest.raises(Unsupported, match="padding on the right alone"):
        decoder(np.ones((2, 3), np.int64), np.array([[1, 1, 1], [0, 1, 1]]))
    for shape in ((1, 3), (2, 0), (2,)):
        with pytest.raises(UsageError, match=r"\[2, 1 or more\] expected"):
            decoder(np.ones(shape, np.int64))
    with pytest.raises(UsageError, match=r"\[2, 1 or more\] expected"):
        decoder(np.ones((2, 3), np.int64), np.ones((2, 2), np.int64))
    assert decoder.lengths.tolist() == [0, 0]


def test_artifacts_that_cannot_be_continued_are_refused(tmp_path: Path) -> None:
    artifact = write_static(tmp_path)
    [spec] = artifact.graphs.values()
    strange = replace(spec, inputs=(*spec.inputs, replace(spec.inputs[0], name="pixel_values")))
    for wrong, what in (
        (replace(artifact, states=()), "continues no text"),
        (replace(artifact, graphs={"a": spec, "b": spec}), "nobody knows here which graph"),
        (replace(artifact, graphs={"model": strange}), "nobody knows here what to feed"),
    ):
        with pytest.raises(Unsupported, match=what):
            Decoder(wrong, OnnxRuntimeSession(wrong))


WRONG: list[tuple[Any, Any, str]] = [
    (np.ones((1, 2), np.float32), None, "tokens are of type float32"),
    (np.full((1, 2), VOCABULARY), None, f"tokens hold {VOCABULARY}, 0 to {VOCABULARY - 1} expected"),
    (np.array([[3, -1]]), None, "tokens hold -1"),
    (np.ones((1, 2), np.int64), np.array([[1, 2]]), "their mask hold 2"),
    (np.ones((1, 0), np.int64), None, "1 or more"),
]


@pytest.mark.parametrize(("ids", "mask", "what"), WRONG)
def test_what_are_no_tokens_is_a_usage_error_and_leaves_the_rows_as_they_were(tmp_path: Path, ids: Any, mask: Any, what: str) -> None:
    artifact = write_grouped(tmp_path)
    decoder = Decoder(artifact, OnnxRuntimeSession(artifact))
    with pytest.raises(UsageError, match=what):
        decoder(ids, mask)
    assert decoder.lengths.tolist() == [0]
    assert decoder(np.ones((1, 2), np.int32)).shape[1] == 2  # of any type of whole numbers


def test_no_rows_at_all_are_a_usage_error(tmp_path: Path) -> None:
    artifact = write_grouped(tmp_path)
    with pytest.raises(UsageError, match="0 rows"):
        Decoder(artifact, OnnxRuntimeSession(artifact), rows=0)


def test_states_that_numpy_has_no_type_for_are_a_missing_device(tmp_path: Path) -> None:
    artifact = write_static(tmp_path)
    narrow = replace(artifact, states=tuple(replace(state, dtype="bfloat16") for state in artifact.states))
    with pytest.raises(TargetUnavailable, match="bfloat16"):
        Decoder(narrow, OnnxRuntimeSession(narrow))(np.ones((1, 1), np.int64))


def test_of_two_graphs_the_one_for_steps_takes_calls_of_one_token(tmp_path: Path) -> None:
    artifact = write_counting(tmp_path)
    [graph] = artifact.graphs.values()
    inner, called = OnnxRuntimeSession(artifact), []

    class Two:
        def __call__(self, name: str, inputs: Any) -> Any:
            called.append(name)
            return inner.run("model", inputs)

    session: Any = Two()
    decoder = Decoder(replace(artifact, graphs={"prefill": graph, "decode": graph}), session)
    decoder(np.array([[4, 5, 6]]))
    logits = decoder(np.array([[7]]))
    assert called == ["prefill", "decode"]
    assert logits[0, -1].argmax() == 8
