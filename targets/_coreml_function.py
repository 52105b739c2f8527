"""A function of MIL built from the traced graph, node by node: its inputs, lengths, constants and states.

::

    %x [batch_size, sequence_length, 64]    input, int32 or float; lengths between the bounds of the signature
    %n = shape(%x), gather(%n, [1])         a length, once for the whole function: from the first input that has it
    %w = const | constexpr_blockwise_shift_scale(%q, %scale)     a parameter, written once for all functions
    %s = read_state(past) …                 a state, where the cache is one

MIL has no integers of 64 bits; what is int64 in the graph is int32. Source: the operators of coremltools@9.0, opset iOS18.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Var, types
from torch.fx import Node
from torch.utils._sympy import functions as lengths

from calque.errors import Unsupported
from calque.runtime.coreml_session import io_name
from calque.traced import TracedModel, source_of
from calque.weights import torch_dtype_name

if TYPE_CHECKING:
    from calque.artifact import TensorSpec
    from calque.weights import Weight

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int32,
    torch.int32: np.int32,
    torch.int8: np.int8,
    torch.bool: np.bool_,
}
MIL = {np.float32: "fp32", np.float16: "fp16", np.int32: "int32", np.bool_: "bool"}
PRIMITIVES = {np.float32: types.fp32, np.float16: types.fp16, np.int32: types.int32, np.bool_: types.bool}
INT32 = np.iinfo(np.int32)

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Signature:
    """How a function is called: ``fixed`` sizes and ``bounds`` of others, by the dimension's name; whether its cache is states."""

    name: str
    fixed: Mapping[str, int]
    bounds: Mapping[str, tuple[int, int]]
    stateful: bool = False


@dataclass
class Shared:
    """What the functions of one program have in common: each weight as an array, read once, and the parameter of each constexpr.

    ``hollow``: no weight is read; each is zeros that take no memory, for a program that is not written.
    """

    arrays: dict[int, Any] = field(default_factory=dict)
    integers: dict[str, str] = field(default_factory=dict)
    palettized: bool = False
    hollow: bool = False

    def array(self, weight: Weight, changed: Callable[[Any], Any] = lambda values: values) -> Any:
        """Return the weight's values, changed as all who read it want them."""
        if id(weight) not in self.arrays:
            self.arrays[id(weight)] = self._hollow(weight, changed) if self.hollow else changed(as_array(weight.read()))
        return self.arrays[id(weight)]

    def _hollow(self, weight: Weight, changed: Callable[[Any], Any]) -> Any:
        zero = torch.zeros([1] * len(weight.shape), dtype=getattr(torch, torch_dtype_name(weight)))
        return np.broadcast_to(changed(as_array(zero)), weight.shape)


def as_array(tensor: torch.Tensor) -> Any:
    """Return a tensor's values in a type of MIL."""
    held = tensor.detach().contiguous().numpy()
    if held.dtype in (np.int64, np.float64):
        return np.clip(held, INT32.min, INT32.max).astype(np.int32) if held.dtype == np.int64 else held.astype(np.float32)
    return held


class Building:
    """The function while it grows: ``value`` of each node, lengths, constants. Rules of operators are given it."""

    def __init__(self, model: TracedModel, signature: Signature, shared: Shared, rules: Mapping[Any, Rule]) -> None:
        self.model, self.signature, self.shared, self.rules = model, signature, shared, rules
        self.values: dict[Node, Any] = {}
        self.parameters = {node: name for name, node in model.parameters().items()}
        self.constants = model.constants()
        self.lengths: dict[Any, Any] = {}
        self.numbers: dict[Any, Any] = {}
        self.states: dict[Node, Any] = {}
        self.node: Node | None = None
        # What coremltools refuses, and why; and what cannot be said for that.
        self.refused: dict[Node, str] = {}
        self.lost: set[Node] = set()
        self._fixed = self._substitutions()

    def build(self) -> Function:
        """Return the function; its inputs and outputs have the names of ``model.inputs`` and ``outputs`` as Core ML takes them.

        Raises:
            Unsupported: coremltools refuses what nodes became; all of them, with module and line.
        """
        placeholders = self.model.placeholders()
        kept = {state.input for state in self.model.states} if self.signature.stateful else set()
        inputs, described = {}, []
        for spec in self.model.inputs:
            node = placeholders[spec.name]
            made, kind = self._input(spec, node, spec.name in kept)
            inputs[io_name(spec.name)] = made
            described.append(kind)
        with Function(inputs, opset_version=_target()) as function:
            for spec in self.model.inputs:
                self._learn(placeholders[spec.name], function.inputs[io_name(spec.name)], spec.name in kept)
            for node in self.model.graph.nodes:
                if node.op == "call_function":
                    self._call(node)
            if not self.refused:
                function.set_outputs(self._outputs())
        if self.refused:
            lines = [" ".join((f"{node.name} ({node.target}):", why, *source_of(node))) for node, why in self.refused.items()]
            raise Unsupported("Core ML cannot say the graph", lines, "use a model without it")
        function.set_input_types(tuple(described))
        return function

    def _learn(self, node: Node, var: Var, state: bool) -> None:
        """An input is known: its value, or that it is a state, and the lengths that it has."""
        if state:
            self.states[node] = var
            return
        self.values[node] = var
        for axis, size in enumerate(self.dims(node)):
            if not isinstance(size, int) and size not in self.lengths:
                self.lengths[size] = (var, axis)

    def _substitutions(self) -> dict[Any, int]:
        """Return the sizes that are fixed, by their symbol in the graph."""
        found = {}
        for spec, node in zip(self.model.inputs, self.model.placeholders().values(), strict=True):
            for name, size in zip(spec.shape, node.meta["val"].shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and name in self.signature.fixed:
                    found[size.node.expr] = self.signature.fixed[str(name)]
        return found

    def dim(self, size: Any) -> Any:
        """Return a size of the graph as an int where it is fixed, else as an expression."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr.subs(self._fixed)
        return int(expr) if expr.is_number else expr

    def dims(self, node: Node) -> list[Any]:
        """Return the sizes of a node's value."""
        return [self.dim(size) for size in node.meta["val"].shape]

    def _input(self, spec: TensorSpec, node: Node, state: bool) -> tuple[Any, Any]:
        """Return an input's placeholder and its description."""
        from coremltools import RangeDim, StateType, TensorType

        dtype = DTYPES[node.meta["val"].dtype]
        shape = []
        for name, size in zip(spec.shape, self.dims(node), strict=True):
            if isinstance(size, int):
                shape.append(size)
                continue
            if size not in self.numbers:
                low, high = self.signature.bounds[str(name)]
                self.numbers[size] = RangeDim(low, high, default=low)
            shape.append(self.numbers[size])
        if state:
            wrapped = TensorType(shape=tuple(shape), dtype=dtype)
            return mb.state_tensor_placeholder(tuple(shape), dtype=PRIMITIVES[dtype]), StateType(wrapped, name=io_name(spec.name))
        kind = TensorType(name=io_name(spec.name), shape=tuple(shape) or (1,), dtype=dtype)
        return mb.placeholder(kind.shape.symbolic_shape, dtype=PRIMITIVES[dtype]), kind

    def length(self, size: Any) -> Any:
        """Return a length as an int, or as a value int32 [1]."""
        if isinstance(size, torch.SymInt | int):
            size = self.dim(size)
        if isinstance(size, int):
            return size
        if size.is_number:
            return int(size)
        known = self.lengths.get(size)
        if isinstance(known, tuple):
            var, axis = known
            known = self.lengths[size] = mb.gather(x=self._shape(var), indices=np.array([axis], np.int32), axis=0)
        if known is None:
            known = self.lengths[size] = self._computed(size)
        return known

    def _shape(self, var: Var) -> Any:
        key = ("shape", var)
        if key not in self.numbers:
            self.numbers[key] = mb.shape(x=var)
        return self.numbers[key]

    def _computed(self, expr: Any) -> Any:
        """Return a length that is reckoned of others."""
        parts = [self.length(part) for part in expr.args]
        operators: dict[Any, Any] = {
            sympy.Add: mb.add, sympy.Mul: mb.mul, lengths.FloorDiv: mb.floor_div, lengths.Mod: mb.mod, lengths.PythonMod: mb.mod,
            lengths.Max: mb.maximum, lengths.Min: mb.minimum, lengths.CleanDiv: mb.floor_div,
        }  # fmt: skip
        operator = operators.get(type(expr))
        if operator is None:
            raise ValueError(f"the length {expr} depends on the values of a call")
        whole, *rest = [np.array([part], np.int32) if isinstance(part, int) else part for part in parts]
        for part in rest:
            whole = operator(x=whole, y=part)
        return whole

    def scalar(self, size: Any) -> Any:
        """Return a length as an int, or as a value int32 []."""
        found = self.length(size)
        return found if isinstance(found, int) else mb.squeeze(x=found, axes=[0])

    def shape(self, sizes: Sequence[Any], inferred: bool = True) -> Any:
        """Return a shape for an operator: numbers, with -1 for one that is not fixed if ``inferred``; else a value."""
        known = [self.length(size) for size in sizes]
        unknown = [at for at, size in enumerate(known) if not isinstance(size, int)]
        if not unknown:
            return np.array(known, np.int32)
        if inferred and len(unknown) == 1:
            return np.array([size if isinstance(size, int) else -1 for size in known], np.int32)
        parts: list[Any] = []
        for size in known:
            if not isinstance(size, int):
                parts.append(size)
            elif parts and isinstance(parts[-1], np.ndarray):
                parts[-1] = np.append(parts[-1], np.int32(size))
            else:
                parts.append(np.array([size], np.int32))
        return mb.concat(values=parts, axis=0) if len(parts) > 1 else parts[0]

    def as_type(self, value: Any, dtype: torch.dtype) -> Any:
        """Return a value or a number in a type of torch's."""
        wanted = DTYPES[dtype]
        if isinstance(value, Var):
            return value if value.dtype == PRIMITIVES[wanted] else mb.cast(x=value, dtype=MIL[wanted])
        if isinstance(value, np.ndarray):
            return value.astype(wanted)
        if wanted is np.int32 and not isinstance(value, bool):
            value = int(min(max(value, INT32.min), INT32.max))
        with np.errstate(over="ignore"):
            return wanted(value)

    def operands(self, *values: Any) -> list[Any]:
        """Return a node's operands in the type that torch would compute in, numbers as numbers."""
        assert self.node is not None
        tensors = [value.meta["val"] if isinstance(value, Node) else value for value in values]
        tensors = [1 if isinstance(value, torch.SymInt) else value for value in tensors]  # of which only the type is asked
        dtype = torch.result_type(tensors[0], tensors[1]) if len(tensors) > 1 else tensors[0].dtype
        return [self.as_type(self.value(value), dtype) for value in values]

    def value(self, argument: Any) -> Any:
        """Return what an argument of a node is here: a value for a node, a length for a symbol, else as it is."""
        if isinstance(argument, Node):
            if isinstance(argument.meta.get("val"), torch.SymInt | int):
                return self.scalar(argument.meta["val"])
            if argument not in self.values:
                self.values[argument] = self._parameter(argument)
            return self.values[argument]
        if isinstance(argument, torch.SymInt):
            return self.scalar(argument)
        if isinstance(argument, list | tuple):
            return [self.value(part) for part in argument]
        return argument

    def _parameter(self, node: Node) -> Any:
        """Return a parameter or a constant of the graph."""
        if node in self.states:
            return mb.read_state(input=self.states[node])
        if node in self.parameters:
            return self.weight(self.model.weights[self.parameters[node]], self.parameters[node])
        array = as_array(self.model.constant(self.constants[node]))
        return mb.const(val=array if array.ndim else array.dtype.type(array), name=io_name(self.constants[node]))

    def weight(self, weight: Weight, name: str, changed: Callable[[Any], Any] = lambda values: values) -> Any:
        """Return the constant of a weight, the same for all who read it; functions of a program share its bytes."""
        if id(weight) not in self.numbers:
            held = mb.const(val=self.shared.array(weight, changed), name=io_name(name))
            held.op.weight_id = io_name(name)
            self.numbers[id(weight)] = held
        return self.numbers[id(weight)]

    def zeros(self, size: int, dtype: torch.dtype) -> Any:
        """Return a bias of nothing, once for all products of that size."""
        key = ("zeros", size, dtype)
        if key not in self.numbers:
            name = f"no_bias_{size}_{MIL[DTYPES[dtype]]}"
            self.numbers[key] = mb.const(val=np.zeros(size, DTYPES[dtype]), name=name)
            self.numbers[key].op.weight_id = name
        return self.numbers[key]

    def _call(self, node: Node) -> None:
        """A node is translated, or refused; what reads one that is refused is left out."""
        if not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
            return  # a length, which is reckoned where it is read; or an assertion, which says nothing of the result
        if self.lost.intersection(node.all_input_nodes):
            self.lost.add(node)
            return
        self.node = node
        try:
            self.values[node] = self.rules[node.target](self, node, *node.args, **node.kwargs)
        except Exception as error:  # coremltools raises what it likes; each is a node that it refuses
            self.refused[node] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._stand_in(node)

    def _stand_in(self, node: Node) -> None:
        """What follows a refused node is looked at too: zeros stand for it, where it is one value whose lengths are known."""
        value = node.meta["val"]
        try:
            assert isinstance(value, torch.Tensor)
            zero = self.as_type(0, value.dtype)
            self.values[node] = mb.fill(shape=self.shape(self.dims(node), inferred=False), value=zero) if value.dim() else zero
        except (AssertionError, ValueError):
            self.lost.add(node)

    def _outputs(self) -> list[Any]:
        kept = {state.output for state in self.model.states} if self.signature.stateful else set()
        returned: Any = self.model.output_node().args[0]
        found = []
        for spec, node in zip(self.model.outputs, returned, strict=True):
            value = self.value(node)  # of a state too, which is written by that
            if spec.name not in kept:
                found.append(mb.identity(x=value, name=io_name(spec.name)))
        return found


def same(one: Any, other: Any) -> bool:
    """Return whether two sizes are the same."""
    return bool(one == other)


def rank(node: Node) -> int:
    """Return how many axes a node's value has."""
    return len(node.meta["val"].shape)


def elements(sizes: Sequence[Any]) -> int | None:
    """Return how many elements a shape has, None where that depends on a call."""
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _target() -> Any:
    from coremltools import target

    return target.iOS18
