"""Decodes with an OpenVINO model that keeps its cache as state, in OpenVINO's own infer request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino  # type: ignore[import-not-found]  # of the peer's environment

from benchmarks.conversion.shapes import Shape

GRAPH = "openvino_model.xml"


class Engine:
    """A compiled model of one artifact; ``properties`` are OpenVINO's own, such as ``INFERENCE_PRECISION_HINT``."""

    def __init__(self, folder: Path, shape: Shape, threads: int, **properties: str) -> None:
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **properties}
        self._request = openvino.Core().compile_model(str(folder / GRAPH), "CPU", settings).create_infer_request()
        self._inputs = {name for port in self._request.model_inputs for name in port.names}

    def restart(self) -> None:
        """The cache is empty."""
        self._request.reset_state()

    def step(self, ids: list[int], total: int) -> int:
        """Return the most probable token after the ids, which are in the cache now; ``total`` counts them and all before."""
        values = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(ids), total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        feed = {name: array for name, array in values.items() if name in self._inputs}
        self._request.infer(feed, share_inputs=True)
        # A view: the logits of the whole prompt are not copied.
        return int(self._request.get_tensor("logits").data[0, -1].argmax())
