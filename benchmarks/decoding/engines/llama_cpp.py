"""Decodes with a GGUF file in llama.cpp, through the low-level interface of llama-cpp-python."""

from __future__ import annotations

from pathlib import Path

import llama_cpp  # type: ignore[import-not-found]  # of the peer's environment
import numpy as np

from benchmarks.conversion.shapes import Shape
from benchmarks.conversion.tools import GGUF

CONTEXT = 1024  # positions: the longest prompt and its steps
BATCH = 512  # the longest prompt goes in one run


class Engine:
    """A context of one model; ``cache`` and ``flash`` are llama.cpp's names of the type of its cache, and of its flash attention's mode."""

    def __init__(self, folder: Path, shape: Shape, threads: int, cache: str = "F16", flash: str = "AUTO") -> None:
        llama_cpp.llama_log_set(_QUIET, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(folder / GGUF).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{cache}")
        params.flash_attn_type = getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
        self._context = llama_cpp.llama_init_from_model(model, params) if model else None
        if not self._context:
            raise SystemExit(f"llama.cpp does not open {folder / GGUF}")
        self._vocabulary = shape.vocabulary

    def restart(self) -> None:
        """The cache is empty."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def step(self, ids: list[int], total: int) -> int:
        """Return the most probable token after the ids, which are in the cache now; the cache itself counts them."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if status := llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit(f"llama_decode gave {status} for {len(ids)} tokens")
        # Of the last position, the only one that such a batch gives.
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (self._vocabulary,)).argmax())


@llama_cpp.llama_log_callback
def _QUIET(level: int, text: bytes, data: object) -> None:
    """Say nothing: llama.cpp lists every tensor otherwise."""
