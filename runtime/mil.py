"""Runs a Core ML ``.mlpackage`` where there is no Core ML: a saved program of MIL, by numpy, operator by operator.

It follows what MIL's operators are documented to do, and every value has the type that the program declares: a result is rounded
to float16 after each operator, so what leaves its range is infinite here as it is there. Within an operator it computes in
float32; how the Neural Engine or a GPU accumulates is not imitated, so equality with a device is not bit for bit.

What an operator does is in `mil_arithmetic`, `mil_layout`, `mil_vision` and `mil_weights`; how a package is read in `mil_file`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calque.errors import ArtifactUnreadable, CalqueError, Unsupported, UsageError
from calque.runtime.mil_arithmetic import ARITHMETIC, Array, Kernel
from calque.runtime.mil_file import TYPES, Block, Feature, Function, MilFile, Named, Operation, Stored, TensorType
from calque.runtime.mil_layout import LAYOUT
from calque.runtime.mil_vision import VISION
from calque.runtime.mil_weights import CONSTANT, WEIGHTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

KERNELS: dict[str, Kernel] = {**ARITHMETIC, **LAYOUT, **VISION, **WEIGHTS}
# Parameters of what is no kernel: it runs blocks, or reads and writes what outlives a call.
CONTROL = {"const": {"val"}, "cond": {"pred"}, "while_loop": {"loop_vars"}, "read_state": {"input"}, "write_state": {"input", "data"}}
OPERATORS: tuple[str, ...] = tuple(sorted({*KERNELS, *CONTROL}))
# Parameters that are several values, also where there is one.
SEVERAL = {"values", "ref_tensors", "begins", "ends", "end_masks", "loop_vars"}
ELEMENTS = {element for element, _ in TYPES.values()} - {"str"}

Values = dict[str, Any]


class MilState:
    """What a stateful package keeps between calls, zeros at first; the functions of a package may share one."""

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.arrays = arrays


class MilProgram:
    """A function of a package, ready to run: constants are read, weights made dense, and each operator bound to its kernel.

    Raises:
        ArtifactUnreadable: the package is missing or damaged.
        UsageError: it has no function of that name.
        Unsupported: operators that the interpreter does not cover, all of them.
    """

    def __init__(self, package: Path, function: str = "main", state: MilState | None = None) -> None:
        self.package = Path(package)
        self.function = function
        self.state = state
        chosen = MilFile.read(self.package).function(function)
        if offenders := _uncovered(chosen):
            fix = "convert without these operators; calque.runtime.mil.OPERATORS are those that it runs"
            raise Unsupported(f"the MIL interpreter cannot run {self.package}, function {function}", offenders, fix)
        declared = chosen.block.inputs
        self.types = {name: kind for name, kind in declared if not kind.is_state}
        self.states = {name: kind for name, kind in declared if kind.is_state}
        self.features = chosen.features
        self.outputs: tuple[str, ...] = chosen.block.outputs
        with np.errstate(all="ignore"):
            self._plan = _Plan(chosen.block, {}, {})
        if self._plan.reads:
            what = f"{self.package}, function {function}, reads values that nothing gives"
            raise ArtifactUnreadable(what, sorted(self._plan.reads), "convert the model again")

    @property
    def inputs(self) -> dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]]:
        """Return the shape and type of each input, None where a length is not fixed; states are not among them."""
        return {name: (kind.shape, kind.dtype) for name, kind in self.types.items()}

    def new_state(self) -> MilState:
        """Return a state of zeros."""
        return MilState({name: np.zeros(kind.lengths, kind.dtype) for name, kind in self.states.items()})

    def __call__(self, inputs: Mapping[str, NDArray[Any]], state: MilState | None = None) -> dict[str, NDArray[Any]]:
        """Return what the function gives for inputs; ``state``, or the one it was opened with, is read and changed.

        Raises:
            UsageError: inputs or state are not those of the function.
            Unsupported: an operator has no result for these values.
        """
        given = {name: self._input(name, kind, inputs) for name, kind in self.types.items()}
        if unknown := sorted(inputs.keys() - self.types.keys()):
            raise UsageError(f"{self.package} has no inputs of these names", unknown, f"it has {', '.join(self.types)}")
        kept = self._arrays(state or self.state)
        with np.errstate(all="ignore"):
            values = self._plan.run(given, kept)
        # What comes out may be an input, a weight or a state: the caller may change it.
        return dict(zip(self.outputs, (np.array(value) for value in values), strict=True))

    def _arrays(self, state: MilState | None) -> Values:
        if not self.states:
            return {}
        if state is None:
            raise UsageError(f"{self.package} is stateful", sorted(self.states), "pass what new_state() gives")
        for name, kind in self.states.items():
            held = state.arrays.get(name)
            if held is None or held.shape != kind.lengths or held.dtype != kind.dtype:
                raise UsageError(f"the state has no {name} of {kind.shape} {kind.element}", fix="pass what new_state() gives")
        return state.arrays

    def _input(self, name: str, kind: TensorType, inputs: Mapping[str, NDArray[Any]]) -> Array:
        if name not in inputs:
            raise UsageError(f"{self.package} needs an input {name}", [f"{one} {kind.shape}" for one, kind in self.types.items()])
        value = np.asarray(inputs[name])
        if problem := _misfit(value, kind, self.features.get(name, Feature())):
            bounds = self.features.get(name, Feature()).bounds
            takes = [f"{low} to {high or 'any'}" if low != high else str(low) for low, high in bounds] or kind.shape
            raise UsageError(f"input {name} of {self.package} {problem}", fix=f"it takes {kind.element} [{', '.join(map(str, takes))}]")
        return value.astype(kind.dtype, copy=False)


def uncovered(package: Path, function: str = "main") -> list[str]:
    """Return what of a function the interpreter cannot run: operator, its name, and why where it is a parameter or a type."""
    return _uncovered(MilFile.read(Path(package)).function(function))


def _uncovered(function: Function) -> list[str]:
    found = [f"input {name} is an image" for name, feature in function.features.items() if not feature.is_array]
    for operation in _operations(function.block):
        said = f"{operation.type} {operation.name}"
        if operation.type not in OPERATORS:
            found.append(said)
            continue
        given = operation.inputs.keys() | operation.attributes.keys()
        known, needed = _parameters(operation.type)
        found += [f"{said}: parameter {name}" for name in sorted(given - known)]
        found += [f"{said}: without parameter {name}" for name in sorted(needed - given)]
        types = {kind.element for _, kind in operation.outputs} - ELEMENTS
        found += [f"{said}: a result of {element}" for element in sorted(types) if (operation.type, element) != ("const", "str")]
    return found


def _operations(block: Block) -> Iterator[Operation]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _parameters(operator: str) -> tuple[set[str], set[str]]:
    """Return the parameters an operator may have, and those it must have."""
    if operator in CONTROL:
        return CONTROL[operator], CONTROL[operator]
    parameters = inspect.signature(KERNELS[operator]).parameters
    return set(parameters), {name for name, one in parameters.items() if one.default is one.empty}


def _misfit(value: Array, kind: TensorType, feature: Feature) -> str:
    """Return why a value is not what an input takes, or nothing."""
    if value.dtype.kind != kind.dtype.kind and {value.dtype.kind, kind.dtype.kind} != {"i", "u"}:
        return f"is of {value.dtype}"
    if kind.dtype.kind in "iu" and value.size and not np.array_equal(value, value.astype(kind.dtype)):
        return f"does not fit into {kind.dtype}"
    fits = len(value.shape) == len(kind.shape) and all(want in (None, is_) for is_, want in zip(value.shape, kind.shape, strict=True))
    if fits and len(feature.bounds) == len(value.shape):
        fits = all(low <= is_ <= (is_ if high is None else high) for is_, (low, high) in zip(value.shape, feature.bounds, strict=True))
        return "" if fits else f"has shape {value.shape}, outside of {feature.bounds}"
    if fits and feature.shapes and value.shape not in feature.shapes:
        return f"has shape {value.shape}, none of {feature.shapes}"
    return "" if fits else f"has shape {value.shape}"


class _Plan:
    """The operators of a block that are left when constants are computed, each with what may be freed after it."""

    def __init__(self, block: Block, constants: Values, wide: Values) -> None:
        constants = dict(constants)
        self.inputs = tuple(name for name, _ in block.inputs)
        self.steps: list[_Step] = []
        for operation in block.operations:
            if operation.type == "const":
                constants[operation.outputs[0][0]] = _loaded(operation.attributes["val"])
            elif operation.type.startswith(CONSTANT):
                results = _Step(operation, constants, {}).run({}, {})
                constants |= {name: result for (name, _), result in zip(operation.outputs, results, strict=True)}
            else:
                self.steps.append(_Step(operation, constants, wide))
        self.outputs = tuple(constants.get(name, Named(name)) for name in block.outputs)
        self.reads = self._free_after_last_use()

    def _free_after_last_use(self) -> set[str]:
        """Say with each step what no later one reads; return the names that come from outside of the block."""
        needed = {one.name for one in self.outputs if isinstance(one, Named)}
        for step in reversed(self.steps):
            made = {name for name, _, _ in step.outputs}
            step.frees = tuple((step.reads | made) - needed)
            needed = (needed - made) | step.reads
        return needed - set(self.inputs)

    def run(self, values: Values, state: Values) -> list[Any]:
        """Return the block's results; ``values`` are its inputs and what it reads of the block around it."""
        values = dict(values)
        for step in self.steps:
            results = step.run(values, state)
            for (name, _, _), result in zip(step.outputs, results, strict=True):
                values[name] = result
            for name in step.frees:
                values.pop(name, None)
        return [_fetched(one, values) for one in self.outputs]


class _Step:
    """One operator with its kernel, what it reads, and what is fixed."""

    def __init__(self, operation: Operation, constants: Values, wide: Values) -> None:
        self.operation = operation
        self.outputs = tuple((name, kind.dtype, kind.shape) for name, kind in operation.outputs)
        self.frees: tuple[str, ...] = ()
        self.widens = operation.type in ARITHMETIC or operation.type in VISION
        self.plans = [_Plan(block, constants, wide) for block in operation.blocks]
        self.fixed: Values = {}
        self.read: dict[str, Any] = {}
        given = {name: (_loaded(value),) for name, value in operation.attributes.items()}
        for name, arguments in (given | operation.inputs).items():
            bound = [self._bound(one, constants, wide) for one in arguments]
            value = bound if name in SEVERAL else bound[0]
            (self.read if any(isinstance(one, Named) for one in bound) else self.fixed)[name] = value
        self.reads = {one.name for value in self.read.values() for one in _each(value) if isinstance(one, Named)}
        self.reads = self.reads.union(*(plan.reads for plan in self.plans))

    def _bound(self, argument: Any, constants: Values, wide: Values) -> Any:
        """Return a constant, of float32 where the kernel computes in it, made so once for all that read it; or a name."""
        if not isinstance(argument, Named):
            return _widened(_loaded(argument)) if self.widens else _loaded(argument)
        if argument.name not in constants:
            return argument
        value = constants[argument.name]
        if not self.widens or not _is_half(value):
            return value
        if argument.name not in wide:
            wide[argument.name] = _widened(value)
        return wide[argument.name]

    def run(self, values: Values, state: Values) -> list[Any]:
        try:
            results = self._results(values, state)
            return [_settled(result, dtype, shape) for result, (_, dtype, shape) in zip(results, self.outputs, strict=True)]
        except CalqueError:
            raise
        except Exception as error:
            what = f"{self.operation.type} {self.operation.name} has no result for these values"
            raise Unsupported(what, [f"{type(error).__name__}: {error}"]) from error

    def _results(self, values: Values, state: Values) -> Sequence[Any]:
        kind = self.operation.type
        if kind == "read_state":
            return [state[self.read["input"].name]]
        if kind == "write_state":
            name = self.read["input"].name
            data = _fetched(self.read.get("data", self.fixed.get("data")), values)
            state[name] = np.array(data).astype(state[name].dtype, copy=False).reshape(state[name].shape)
            return []
        given = dict(self.fixed)
        for name, value in self.read.items():
            given[name] = [self._fetch(one, values) for one in value] if isinstance(value, list) else self._fetch(value, values)
        if kind == "cond":
            return self.plans[0 if given["pred"] else 1].run(values, state)
        if kind == "while_loop":
            return self._loop(given["loop_vars"], values, state)
        found = KERNELS[kind](**given)
        return found if isinstance(found, list) else [found]

    def _loop(self, variables: list[Any], values: Values, state: Values) -> list[Any]:
        condition, body = self.plans
        while condition.run(values | dict(zip(condition.inputs, variables, strict=True)), state)[0]:
            variables = body.run(values | dict(zip(body.inputs, variables, strict=True)), state)
        return variables

    def _fetch(self, one: Any, values: Values) -> Any:
        value = _fetched(one, values)
        return _widened(value) if self.widens else value


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _loaded(value: Any) -> Any:
    return value.load() if isinstance(value, Stored) else value


def _fetched(one: Any, values: Values) -> Any:
    return values[one.name] if isinstance(one, Named) else one


def _is_half(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float16


def _widened(value: Any) -> Any:
    return value.astype(np.float32) if _is_half(value) else value


def _settled(result: Any, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> Array:
    """Return a result as it is declared.

    Raises:
        ValueError: its shape is another.
    """
    found = np.asarray(result).astype(dtype, copy=False)
    if len(found.shape) != len(shape) or any(want not in (None, is_) for is_, want in zip(found.shape, shape, strict=True)):
        raise ValueError(f"a result of shape {found.shape} where {shape} is declared")
    return found
