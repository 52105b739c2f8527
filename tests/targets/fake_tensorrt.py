"""A stand-in for `tensorrt` where no GPU is: the names of the real one, over ONNX Runtime and the memory of fake_cudart.c.

A plan is JSON: ``onnx`` (the file), ``profiles`` (as in profiles.json), ``aliases`` (output: input), and ``fault``, what is wrong with
the engine. Copied to ``tensorrt.py`` or ``tensorrt_rtx.py`` it is either; the latter replays graphs by itself.
"""

from __future__ import annotations

import atexit
import ctypes
import enum
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

__version__ = "11.4.0"
RTX = __name__ == "tensorrt_rtx"
NAMES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64", "tensor(int32)": "INT32"}
STORED = {"FLOAT": "f4", "HALF": "f2", "INT64": "i8", "INT32": "i4"}
CUDA = ctypes.CDLL("libcudart.so.13")
CUDA.fakeLaunch.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
atexit.register(lambda: print(f"graphs were launched {CUDA.fakeLaunches()} times", file=sys.stderr))


class DataType(enum.Enum):
    FLOAT, HALF, INT64, INT32 = range(4)


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError


if RTX:

    class CudaGraphStrategy(enum.Enum):
        DISABLED, WHOLE_GRAPH_CAPTURE = range(2)

    class IRuntimeConfig:
        cuda_graph_strategy: CudaGraphStrategy


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            return ICudaEngine(json.loads(serialized_engine))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None


class ICudaEngine:
    def __init__(self, plan: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._plan, self._session = plan, onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self._inputs = {spec.name: spec for spec in self._session.get_inputs()}
        self._outputs = {spec.name: spec for spec in self._session.get_outputs()}
        self._names: list[str] = [*self._inputs, *self._outputs]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        found = DataType[NAMES[(self._inputs | self._outputs)[name].type]]
        return DataType.FLOAT if self._plan["fault"] == "dtype" and found is DataType.HALF else found

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in (self._inputs | self._outputs)[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        shapes = self._plan["profiles"][profile_index]["shapes"][name]
        return [tuple(shapes[end]) for end in ("min", "opt", "max")]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None if self._plan["fault"] == "copied states" else self._plan["aliases"].get(name)

    def create_execution_context(self, runtime_config: object = None) -> IExecutionContext:
        assert (runtime_config is not None) == RTX
        return IExecutionContext(self)

    if RTX:

        def create_runtime_config(self) -> IRuntimeConfig:
            return IRuntimeConfig()


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile = engine, 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kept: list[Any] = []  # callbacks that a stream or a graph may still call

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle
        self._profile = profile_index
        self._shapes.clear()
        self._addresses.clear()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return bool(memory)

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = dict(zip(("batch_size", "sequence_length"), self._shapes[next(iter(self._engine._inputs))], strict=False))
        shape = tuple(dims[size] if isinstance(size, str) else size for size in self._engine._outputs[name].shape)
        return (*shape[:-1], 1) if self._engine._plan["fault"] == "narrow output" and name == "logits" else shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        """What is bound and shaped now is what runs, whatever is bound later."""
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        aliases = self._engine._plan["aliases"]
        if set(addresses) != set(self._engine._names) or any(addresses[out] != addresses[source] for out, source in aliases.items()):
            return False
        callback = ctypes.CFUNCTYPE(None)(lambda: self._run(addresses, shapes))
        self._kept.append(callback)
        return not CUDA.fakeLaunch(ctypes.cast(callback, ctypes.c_void_p), stream_handle)

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        try:
            self._compute(addresses, shapes)
        except BaseException as error:  # ctypes would print it and go on
            print(f"fake kernel: {error}", file=sys.stderr, flush=True)
            os._exit(70)

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        engine, fault = self._engine, self._engine._plan["fault"]
        if "write_indices" in engine._inputs and self._past_the_end(addresses, shapes):
            return  # as the real one, without a word
        given = {name: _at(addresses[name], shapes[name], NAMES[spec.type]).copy() for name, spec in engine._inputs.items()}
        if fault == "ignores write_indices":
            given["write_indices"][...] = 0
        if fault == "ignores padding" and "attention_mask" in given:
            given["attention_mask"][...] = 1
        found = dict(zip(engine._outputs, engine._session.run(None, given), strict=True))
        for name, array in found.items():
            source = name
            if fault == "swapped outputs" and name.endswith((".key", ".value")):
                source = name.replace(".key", ".?").replace(".value", ".key").replace(".?", ".value")
            value = np.full_like(array, np.nan) if fault == "NaN" and "." not in name else found[source]
            if fault == "one step late" and shapes["input_ids"][1] == 1 and name == "logits":
                value = np.roll(value, 1, axis=-1)
            _at(addresses[name], array.shape, NAMES[engine._outputs[name].type])[...] = value

    def _past_the_end(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> bool:
        [slots] = {shape[2] for name, shape in shapes.items() if name.startswith("past")}
        first = _at(addresses["write_indices"], shapes["write_indices"], "INT64")
        return bool((first + shapes["input_ids"][1] > slots).any())


def _at(address: int, shape: Sequence[int], dtype: str) -> Any:
    nbytes = math.prod(shape) * np.dtype(STORED[dtype]).itemsize
    return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address)).view(STORED[dtype]).reshape(shape)
