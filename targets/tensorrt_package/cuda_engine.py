"""What run_engine.py runs: the CUDA runtime's functions through ctypes, and an engine over buffers that are allocated once."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SDKS = ("tensorrt", "tensorrt_rtx")

Array = NDArray[Any]
Shapes = dict[str, tuple[int, ...]]

# How dtypes of the manifest lie in memory, and how TensorRT calls them. numpy has no bfloat16: its bits are kept.
STORED = {"float32": "f4", "float16": "f2", "bfloat16": "u2", "int64": "i8", "int32": "i4", "int8": "i1", "uint8": "u1", "bool": "?"}
TRT_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "int8": "INT8",
             "uint8": "UINT8", "bool": "BOOL"}  # fmt: skip
P, INT, SIZE, UINT, OUT = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_ulonglong, ctypes.POINTER(ctypes.c_void_p)
CUDA = {
    "cudaGetDeviceCount": (ctypes.POINTER(INT),), "cudaGetDeviceProperties": (P, INT), "cudaGetLastError": (),
    "cudaMalloc": (OUT, SIZE), "cudaMallocHost": (OUT, SIZE), "cudaFree": (P,),
    "cudaMemcpyAsync": (P, P, SIZE, INT, P), "cudaMemsetAsync": (P, INT, SIZE, P),
    "cudaStreamCreateWithFlags": (OUT, ctypes.c_uint), "cudaStreamSynchronize": (P,),
    "cudaStreamBeginCapture": (P, INT), "cudaStreamEndCapture": (P, OUT),
    "cudaGraphInstantiateWithFlags": (OUT, P, UINT), "cudaGraphLaunch": (P, P), "cudaGraphExecDestroy": (P,), "cudaGraphDestroy": (P,),
}  # fmt: skip
TO_DEVICE, TO_HOST, ON_DEVICE, NON_BLOCKING, THREAD_LOCAL = 1, 2, 3, 1, 1


class Failed(Exception):
    """It cannot be done: why, what was said, and the exit code."""

    def __init__(self, what: str, problems: Sequence[str] = (), code: int = 1) -> None:
        super().__init__(what)
        self.problems, self.code = list(problems), code


def load_sdk(names: Sequence[str]) -> Any:
    """Return the first SDK that can be imported.

    Raises:
        Failed: none can.
    """
    why = []
    for name in names:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: its libraries are not where the loader looks
            why.append(f"{name}: {error}")
    raise Failed("no TensorRT here: pip install tensorrt (NVIDIA GPU) or tensorrt-rtx (builds on any x86-64 CPU)", why, 5)


def above_zero(kind: type[int] | type[float]) -> Any:
    """Return what reads a number above 0 from the command line."""

    def number(text: str) -> float:
        if not (found := kind(text)) > 0:
            raise ValueError(text)
        return found

    return number


class Refused(Exception):
    """A call would write past the last slot, which TensorRT does not say: it drops what has no place."""


def make_log(trt: Any) -> Any:
    """Return a logger that keeps what the SDK says: ``errors`` and ``warnings``, each line once. Builder errors appear nowhere else."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: dict[str, None] = {}
            self.warnings: dict[str, None] = {}

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors[msg.strip()] = None
            elif severity <= trt.ILogger.Severity.WARNING:
                self.warnings[msg.strip()] = None

    return Log()


class Cuda:
    """The CUDA runtime's functions by name, one stream, and memory that lives as long as the process."""

    def __init__(self) -> None:
        self.library = self._load()
        for name, kinds in CUDA.items():
            getattr(self.library, name).argtypes = kinds
        self.library.cudaGetErrorString.restype = ctypes.c_char_p
        count = INT()
        if (code := self.library.cudaGetDeviceCount(ctypes.byref(count))) or not count.value:
            raise Failed("no NVIDIA GPU here: run this on the machine that has it", [self.text(code)], 5)
        properties = ctypes.create_string_buffer(1 << 14)  # begins with the name, whatever follows in this version
        self("cudaGetDeviceProperties", properties, 0)
        self.device = properties.value.decode(errors="replace")
        self.stream = self.made("cudaStreamCreateWithFlags", NON_BLOCKING)

    @staticmethod
    def _load() -> ctypes.CDLL:
        names = ["libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll"]
        for place in sys.path:
            for pattern in ("nvidia/cu13/lib/libcudart.so.*", "nvidia/*/lib/libcudart.so.*"):
                names += [str(path) for path in sorted(Path(place or ".").glob(pattern))]
        for name in [*names, ctypes.util.find_library("cudart") or "libcudart.so"]:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue  # the last of them is the answer
        raise Failed("no CUDA runtime library here: pip install nvidia-cuda-runtime", [f"tried {', '.join(names)}"], 5)

    def text(self, code: int) -> str:
        """Return what an error code means."""
        return str(self.library.cudaGetErrorString(code).decode())

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            Failed: it returns an error.
        """
        if code := getattr(self.library, name)(*arguments):
            self.library.cudaGetLastError()
            raise Failed(f"{name}: {self.text(code)}")

    def made(self, name: str, *arguments: Any) -> int:
        """Return what a function makes, whose place is its first argument."""
        place = P()
        self(name, ctypes.byref(place), *arguments)
        return place.value or 0

    def made_last(self, name: str, *arguments: Any) -> int:
        """Return what a function makes, whose place is its last argument."""
        place = P()
        self(name, *arguments, ctypes.byref(place))
        return place.value or 0

    def pinned(self, nbytes: int) -> Array:
        """Return bytes of the host that copies need not stage."""
        address = self.made("cudaMallocHost", nbytes)
        return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))

    def synchronize(self) -> None:
        """All work of the stream is done."""
        self("cudaStreamSynchronize", self.stream)

    def bandwidth(self) -> float:
        """Return GB/s that copies within the device move, what is read and what is written."""
        for nbytes in (1 << 30, 1 << 27, 1 << 22):
            try:
                source, target = self.made("cudaMalloc", nbytes), self.made("cudaMalloc", nbytes)
            except Failed:
                continue  # no room beside the engine
            seconds = []
            for _ in range(6):
                begun = time.perf_counter()
                self("cudaMemcpyAsync", target, source, nbytes, ON_DEVICE, self.stream)
                self.synchronize()
                seconds.append(time.perf_counter() - begun)
            for address in (source, target):
                self("cudaFree", address)
            return 2e-9 * nbytes / min(seconds[1:])
        raise Failed("no memory is left to measure the bandwidth", ["give it: --bandwidth GB/s"])


class Engine:
    """The engine with one buffer a tensor, each allocated once; a state's output is its input.

    ``graphs``: replay decode steps as one CUDA graph. `allocate` comes before the first call.
    """

    def __init__(self, trt: Any, cuda: Cuda, plan: Path, manifest: Mapping[str, Any], graphs: bool) -> None:
        self.cuda = cuda
        self.inputs = {spec["name"]: spec for spec in manifest["graphs"]["model"]["inputs"]}
        self.outputs = {spec["name"]: spec for spec in manifest["graphs"]["model"]["outputs"]}
        self.states = {state["output"]: state["input"] for state in manifest["states"]}
        self.max_length = manifest["limits"]["max_length"]
        self.log = make_log(trt)
        self.runtime = trt.Runtime(self.log)
        self.engine: Any = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if self.engine is None:
            # No fault of its numbers: nothing was run.
            raise Failed(f"{plan.name} cannot be loaded: it belongs to the SDK, version and GPU that built it", list(self.log.errors), 5)
        self._require_io(trt)
        self.own_graphs = hasattr(trt, "CudaGraphStrategy")  # TensorRT-RTX captures and replays by itself
        self.graphs, self.graph, self.why_no_graph = graphs and bool(self.states), 0, ""
        if self.own_graphs:
            config = self.engine.create_runtime_config()
            strategy = trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if self.graphs else strategy.DISABLED
            self.context = self.engine.create_execution_context(config)
        else:
            self.context = self.engine.create_execution_context()
        if self.context is None:
            raise Failed("the engine gives no execution context", list(self.log.errors))
        self.profiles = [self._ranges(i) for i in range(self.engine.num_optimization_profiles)]
        self.profile, self.shapes, self.ran = 0, Shapes(), False
        self.device: dict[str, int] = {}
        self.host: dict[str, Array] = {}

    def _require_io(self, trt: Any) -> None:
        """Leave quietly if the engine's tensors are the manifest's, states in place."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        specs = self.inputs | self.outputs
        problems = [f"{name}: in one of engine and manifest alone" for name in sorted(set(names) ^ set(specs))]
        for name in sorted(set(names) & set(specs)):
            found, wanted = self.engine.get_tensor_dtype(name).name, TRT_NAMES[specs[name]["dtype"]]
            problems += [f"{name}: the engine has {found}, the manifest {wanted}"] if found != wanted else []
        if hasattr(self.engine, "get_aliased_input_tensor"):
            pairs = {out: self.engine.get_aliased_input_tensor(out) for out in self.states if out in names}
            problems += [f"{out}: shares its memory with {pair}, not {self.states[out]}" for out, pair in pairs.items()
                         if pair != self.states[out]]  # fmt: skip
        if problems:
            raise Failed("the engine is not the manifest's", problems)

    def _ranges(self, profile: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the smallest and largest shape of each input of changing shape."""
        dynamic = [name for name in self.inputs if -1 in tuple(self.engine.get_tensor_shape(name))]
        found = {name: self.engine.get_tensor_profile_shape(name, profile) for name in dynamic}
        return {name: (tuple(ends[0]), tuple(ends[2])) for name, ends in found.items()}

    def shapes_of(self, specs: Mapping[str, Any], rows: int, columns: int) -> Shapes:
        """Return the shapes that a call of so many rows and columns has."""
        dims = {"batch_size": rows, "sequence_length": columns, "total_sequence_length": columns}
        return {name: tuple(dims[size] if isinstance(size, str) else size for size in spec["shape"]) for name, spec in specs.items()}

    def profile_of(self, shapes: Shapes) -> int | None:
        """Return the narrowest profile that takes those shapes; None where no profile does."""

        def fits(ranges: Mapping[str, Any]) -> bool:
            return all(
                len(low) == len(shapes[name]) and all(a <= size <= b for a, size, b in zip(low, shapes[name], high, strict=True))
                for name, (low, high) in ranges.items()
            )

        fitting = [i for i, ranges in enumerate(self.profiles) if fits(ranges)]
        return min(fitting, key=lambda i: sum(math.prod(high) for _, high in self.profiles[i].values()), default=None)

    def widest(self, rows: int, columns: int) -> int:
        """Return how many columns of that many one call takes at most; 0 where no profile takes so many rows."""
        found = (size for size in range(columns, 0, -1) if self.profile_of(self.shapes_of(self.inputs, rows, size)) is not None)
        return next(found, 0)

    def allocate(self, calls: Sequence[tuple[int, int]]) -> None:
        """Every tensor has memory for the largest of those calls, (rows, columns), and the context knows where."""
        specs = self.inputs | self.outputs
        sizes = dict.fromkeys(specs, 1)
        for rows, columns in calls:
            for name, shape in self.shapes_of(specs, rows, columns).items():
                sizes[name] = max(sizes[name], math.prod(shape) * np.dtype(STORED[specs[name]["dtype"]]).itemsize)
        for name, nbytes in sizes.items():
            self.device[name] = self.device[self.states[name]] if name in self.states else self.cuda.made("cudaMalloc", nbytes)
            if name not in self.states and name not in self.states.values():
                self.host[name] = self.cuda.pinned(nbytes)
        self.sizes = sizes
        self._bind()

    def _bind(self) -> None:
        for name, address in self.device.items():
            if not self.context.set_tensor_address(name, address):
                raise Failed(f"the context takes no address for {name}", list(self.log.errors))

    def reset(self) -> None:
        """Every slot is zero."""
        for name in self.states.values():
            self.cuda("cudaMemsetAsync", self.device[name], 0, self.sizes[name], self.cuda.stream)
        self.cuda.synchronize()

    def __call__(self, given: Mapping[str, Array], fetch: bool = True) -> dict[str, Array]:
        """Return what one call gives, states apart, floats as float32; nothing without ``fetch``.

        Raises:
            Refused: a row would need a slot past the last.
            Failed: the engine does not take the shapes, or does not run.
        """
        rows, columns = next(array for array in given.values() if array.ndim > 1).shape[:2]
        ends = given.get("write_indices", np.zeros(1, np.int64)) + columns
        if self.max_length and "input_ids" in given and ends.max() > self.max_length:
            raise Refused(f"{ends.max()} slots are needed, max_length is {self.max_length}")
        self._set_shapes(rows, columns)
        for name, array in given.items():
            self._host(name, array.shape)[...] = array
            self.cuda("cudaMemcpyAsync", self.device[name], self.host[name].ctypes.data, self._nbytes(name, array.shape),
                      TO_DEVICE, self.cuda.stream)  # fmt: skip
        self._launch(self.graphs and columns == 1)
        shapes = self.shapes_of({n: s for n, s in self.outputs.items() if n not in self.states}, rows, columns) if fetch else {}
        for name, shape in shapes.items():
            self.cuda("cudaMemcpyAsync", self.host[name].ctypes.data, self.device[name], self._nbytes(name, shape),
                      TO_HOST, self.cuda.stream)  # fmt: skip
        self.cuda.synchronize()
        return {name: as_float(self._host(name, shape), self.outputs[name]["dtype"]) for name, shape in shapes.items()}

    def _nbytes(self, name: str, shape: Sequence[int]) -> int:
        spec = self.inputs.get(name) or self.outputs[name]
        return math.prod(shape) * np.dtype(STORED[spec["dtype"]]).itemsize

    def _host(self, name: str, shape: Sequence[int]) -> Array:
        spec = self.inputs.get(name) or self.outputs[name]
        return self.host[name][: self._nbytes(name, shape)].view(STORED[spec["dtype"]]).reshape(shape)

    def _set_shapes(self, rows: int, columns: int) -> None:
        """The context has the shapes of such a call, under the profile that fits them best; a graph of others is dropped.

        Raises:
            Failed: no profile takes them.
        """
        shapes = self.shapes_of(self.inputs, rows, columns)
        if shapes == self.shapes:
            return
        profile = self.profile_of(shapes)
        if profile is None:
            raise Failed(f"no profile of the engine takes {shapes}")
        if self.graph:
            self.cuda("cudaGraphExecDestroy", self.graph)
        self.graph, self.ran, self.shapes = 0, False, shapes
        if profile != self.profile:
            if not self.context.set_optimization_profile_async(profile, self.cuda.stream):
                raise Failed(f"the context does not take profile {profile}", list(self.log.errors))
            self.cuda.synchronize()
            self.profile = profile
            self._bind()
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise Failed(f"the context does not take shape {shape} of {name}", list(self.log.errors))
        if unknown := self.context.infer_shapes():
            raise Failed("shapes do not follow from those of the inputs", unknown)
        expected = self.shapes_of(self.outputs, rows, columns)
        found = {name: tuple(self.context.get_tensor_shape(name)) for name in expected}
        if wrong := [f"{name}: {found[name]}, the manifest says {shape}" for name, shape in expected.items() if found[name] != shape]:
            raise Failed("outputs are not as large as the manifest says", wrong)

    def _launch(self, replay: bool) -> None:
        """The stream runs the network once more; from the second time on with equal shapes as a graph, where asked."""
        if replay and not self.own_graphs and self.ran and not self.graph and not self.why_no_graph:
            self._capture()
        if replay and self.graph:
            self.cuda("cudaGraphLaunch", self.graph, self.cuda.stream)
        elif not self.context.execute_async_v3(self.cuda.stream):
            raise Failed("the engine did not run", list(self.log.errors))
        self.ran = True

    def _capture(self) -> None:
        """``graph`` is one run with the shapes and addresses of now, or ``why_no_graph`` says why there is none."""
        try:
            self.cuda("cudaStreamBeginCapture", self.cuda.stream, THREAD_LOCAL)
            taken = self.context.execute_async_v3(self.cuda.stream)
            graph = self.cuda.made_last("cudaStreamEndCapture", self.cuda.stream)
            if not taken:
                raise Failed("the engine did not run while it was captured")
            self.graph = self.cuda.made("cudaGraphInstantiateWithFlags", graph, 0)
            self.cuda("cudaGraphDestroy", graph)
        except Failed as error:
            self.why_no_graph = str(error)  # decoding is slower without, and as right

    @property
    def replays(self) -> bool:
        """Whether decode steps are replayed as a graph."""
        return self.graphs and not self.why_no_graph


def as_float(array: Array, dtype: str) -> NDArray[np.float32]:
    """Return a copy in float32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
