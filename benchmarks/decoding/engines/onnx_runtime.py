"""Decodes with an ONNX graph: inputs by the names that the graph has, the cache handed on without copies."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import OrtValue

from benchmarks.conversion.shapes import Shape

GRAPH = "model.onnx"
PAST, PRESENT = "past_key_values.", "present."
ERRORS = 3  # of onnxruntime's levels of logging


class Engine:
    """A session of one artifact."""

    def __init__(self, folder: Path, shape: Shape, threads: int, profile: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS
        options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self.session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self.session.get_inputs()]
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._empty = [1, shape.kv_heads, 0, shape.head_dim]
        self._cache: dict[str, OrtValue] = {}

    def restart(self) -> None:
        """The cache is empty."""
        self._cache = {name: _value(np.zeros(self._empty, np.float32)) for name in self._inputs if name.startswith(PAST)}

    def step(self, ids: list[int], total: int) -> int:
        """Return the most probable token after the ids, which are in the cache now; ``total`` counts them and all before."""
        values = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(ids), total, dtype=np.int64)[None],
        }
        feed = {name: _value(array) for name, array in values.items() if name in self._inputs}
        found = dict(zip(self._outputs, self.session.run_with_ort_values(self._outputs, feed | self._cache), strict=True))
        self._cache = {name: found[name.replace(PAST, PRESENT)] for name in self._cache}
        return int(_last(found["logits"]).argmax())


def _value(array: NDArray[np.generic]) -> OrtValue:
    return OrtValue.ortvalue_from_numpy(array)


def _last(logits: OrtValue) -> NDArray[np.float32]:
    """Return the logits of the last position where they lie; ``numpy()`` would copy those of the whole prompt."""
    _, positions, vocabulary = logits.shape()
    row = ctypes.sizeof(ctypes.c_float) * vocabulary * (positions - 1)
    # A view of memory that ``logits`` owns: good as long as the caller holds it.
    return np.ctypeslib.as_array(ctypes.cast(logits.data_ptr() + row, ctypes.POINTER(ctypes.c_float)), (vocabulary,))
