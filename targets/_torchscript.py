"""TorchScript of a program in ATen: a line for a node, sizes worked out from the inputs of each call.

::

    %size = aten.sym_size.int(%arg_0, 1)               size_0 = input_ids.size(1)
    %total = operator.add(%past, %size)                add_1 = past + size_0
    %halves = aten.split.Tensor(%x, 96, -1)            split_2_0, split_2_1 = torch.ops.aten.split(x, 96, -1)
    %left = operator.getitem(%halves, 0)
    %turned = aten.view.default(%x, [%size, -1, 24])   view_3 = torch.ops.aten.reshape(add_1, [size_0, -1, 24])
    %p_norm_weight                                     self.model_norm_weight, one attribute for tied ones
    %n = aten.clone.default(%x)                        x: nothing is written in place, so that no copy is needed

A trace by torch.jit bakes in the sizes that it saw; these lines hold for any.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from calque.targets import Problem
from calque.targets._torchscript_literals import Inexpressible, argument, number
from calque.traced import source_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from calque.traced import TracedModel

aten = torch.ops.aten

# What says something of sizes and returns nothing.
ASSERTIONS = frozenset(
    {
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
# Another name for the same numbers, where nothing is written in place.
ALIASES = frozenset(
    {
        aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.detach_.default,
        aten.lift_fresh_copy.default, aten.lift_fresh.default,
    }
)  # fmt: skip
# What asks how numbers lie in memory, which another release of torch may decide otherwise than the one that traced: attention of 2.1
# gives them in another order than that of 2.13.
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
LAID = frozenset({aten.as_strided.default, aten.sym_stride.int, aten.sym_storage_offset.default})
# Arithmetic on sizes, as TorchScript writes it.
INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/", operator.mod: "%",
    operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.and_: "and", operator.or_: "or",
}  # fmt: skip
PREFIX: dict[Any, str] = {
    operator.neg: "-{}", torch.sym_not: "not {}", torch.sym_float: "float({})", torch.sym_int: "int({})", operator.abs: "abs({})",
    torch.sym_max: "max({}, {})", torch.sym_min: "min({}, {})", math.ceil: "math.ceil({})", math.floor: "math.floor({})",
    math.trunc: "int({})", round: "round({})", torch.sym_ite: "({1} if {0} else {2})",
}  # fmt: skip
SIZES: dict[Any, str] = {
    aten.sym_size.int: "{}.size({})", aten.sym_numel.default: "{}.numel()",
}  # fmt: skip
# Operators whose names are no words of Python's.
DUNDER = {"__and__": "&", "__or__": "|", "__xor__": "^", "__lshift__": "<<", "__rshift__": ">>"}
# Where results of a call lie that say nothing of a CPU that computes.
SILENT = {"device": torch.device("cpu"), "layout": torch.strided, "pin_memory": False}

Write = Callable[["Writer", Node], str]


def as_it_is(held: Tensor) -> Tensor:
    """Return a parameter that the module holds as it was."""
    return held


@dataclass(frozen=True)
class Attribute:
    """Something that the module holds: made of real tensors by ``make``, kept from being folded into others if ``kept``.

    ``weight``: the name of the weight whose integers these are.
    """

    parts: tuple[Node, ...]
    make: Callable[..., Any]
    kept: bool = False
    weight: str = ""


@dataclass
class Writer:
    """Lines of TorchScript, written node by node; ``own`` writes operators that are no operators of ATen.

    ``origins``: the node of each line; ``names``: what a node's value is called; ``attributes``: what the module holds, by name;
    ``methods``: others than ``forward``, whole.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    own: Mapping[Any, Write] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    origins: list[Node] = field(default_factory=list)
    names: dict[Node, str] = field(default_factory=dict)
    attributes: dict[str, Attribute] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Know which parameter each placeholder is, and write every node."""
        specs = self.program.graph_signature.input_specs
        self.held = {spec.arg.name: spec.target for spec in specs if spec.kind != InputKind.USER_INPUT and spec.target is not None}
        arguments = iter(unique_names(self.inputs))
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name not in self.held:
                self.names[node] = next(arguments)
        self.arguments = list(self.names.values())
        for node in self.program.graph.nodes:
            try:
                self._node(node)
            except Inexpressible as error:
                self.problems.append(Problem(node.name, *source_of(node), str(error), error.fix))
                self.names[node] = "None"

    @property
    def source(self) -> str:
        """The methods, ``forward`` first."""
        given = "".join(f", {name}: Tensor" for name in self.arguments)
        return f"def forward(self{given}):\n" + "".join(f"    {line}\n" for line in self.lines) + "".join(self.methods)

    def _node(self, node: Node) -> None:
        if node.op == "output":
            values = [self.value(value) for value in node.args[0]]  # type: ignore[union-attr]
            self.line(node, "return " + (f"({', '.join(values)})" if len(values) > 1 else values[0]))
        elif node.op == "get_attr":
            self.names[node] = "None"  # a graph inside the graph: what calls it is refused
        elif node.op == "call_function":
            self._call(node)

    def _call(self, node: Node) -> None:
        target: Any = node.target
        if target in ASSERTIONS:
            return
        if target in ALIASES:
            self.names[node] = self.value(node.args[0])
        elif target is operator.getitem:
            self._item(node)
        else:
            self._assign(node, self.own[target](self, node) if target in self.own else self._expression(node))

    def _assign(self, node: Node, expression: str) -> None:
        """Write a line; of an operator with several results each has a name of its own."""
        called = self.fresh(node)
        results = node.meta.get("val")
        self.names[node] = called
        if isinstance(results, list | tuple):
            read = {user.args[1] for user in node.users if user.target is operator.getitem}
            parts = [f"{called}_{at}" if at in read else "_" for at in range(len(results))]
            self.line(node, f"{', '.join(parts)} = {expression}{'[0]' if len(results) == 1 else ''}")
        else:
            self.line(node, f"{called} = {expression}")

    def fresh(self, node: Node) -> str:
        """Return a name for a node's value, by its operator and line: names of nodes depend on what was traced before."""
        target: Any = node.target
        known = target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "value")
        return f"{known.strip('_')}_{len(self.lines)}"

    def line(self, node: Node, text: str) -> None:
        """Write a line of ``forward`` that comes from a node."""
        self.lines.append(text)
        self.origins.append(node)

    def _item(self, node: Node) -> None:
        values, at = node.args
        if not isinstance(values, Node) or values.target in SIZES or not isinstance(at, int):
            raise Inexpressible(f"an item of {values} is nothing that TorchScript can take out")
        self.names[node] = f"{self.value(values)}_{at}"

    def _expression(self, node: Node) -> str:
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise Inexpressible(
                f"{target} runs a graph inside the graph, which has no line of TorchScript", "leave the control flow out of the model"
            )
        if target in INFIX:
            return self._of_its_kind(node, f"{self.value(node.args[0])} {INFIX[target]} {self.value(node.args[1])}")
        if target in PREFIX or target in SIZES:
            return (PREFIX.get(target) or SIZES[target]).format(*map(self.value, node.args))
        if target in (aten.item.default, aten._local_scalar_dense.default):
            return self._of_its_kind(node, f"{self.value(node.args[0])}.item()", always=True)
        if not isinstance(target, torch._ops.OpOverload):
            raise Inexpressible(f"{getattr(target, '__name__', target)} is no operator that TorchScript knows")
        return self._operator(node, target)

    def _of_its_kind(self, node: Node, expression: str, always: bool = False) -> str:
        """Return a number as the type that it is in the program: a power of integers would be a float."""
        kinds = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}
        kind = kinds.get(type(node.meta.get("val")), type(node.meta.get("val")).__name__)
        return f"{kind}({expression})" if always or (kind == "int" and node.target is operator.pow) else expression

    def _operator(self, node: Node, target: Any) -> str:
        namespace, name = target._schema.name.split("::")
        if target in LAID:
            raise Inexpressible(f"{target} depends on how numbers lie in memory, which no release of torch promises another")
        if target in VIEWS:
            name = "reshape"
        if namespace not in ("aten", "quantized"):
            raise Inexpressible(f"{target} has no TorchScript", _way_out(target))
        known = {each.name: each.type for each in target._schema.arguments}
        given = [argument(value, each.type, self.value) for value, each in zip(node.args, target._schema.arguments, strict=False)]
        keywords = {key: value for key, value in node.kwargs.items() if value is not None}
        if (device := keywords.get("device")) is not None and torch.device(device).type != "cpu":  # type: ignore[arg-type]
            raise Inexpressible(f"{target} makes a tensor on {device}", "convert the model on the CPU")
        keywords = {key: value for key, value in keywords.items() if key not in SILENT or value != SILENT[key]}
        if name in DUNDER:
            return f"{given[0]} {DUNDER[name]} {given[1]}"
        if target is aten._to_copy.default and keywords.keys() <= {"dtype", "non_blocking"}:
            # No copy where the type is the same already: nothing is written in place.
            return f"torch.ops.aten.to({given[0]}, {argument(keywords['dtype'], known['dtype'], self.value)})" if keywords else given[0]
        given += [f"{key}={argument(value, known[key], self.value)}" for key, value in keywords.items()]
        return f"torch.ops.{namespace}.{name}({', '.join(given)})"

    def value(self, value: Any) -> str:
        """Return what a node, or a number among sizes, is called.

        Raises:
            Inexpressible: a value that has no form.
        """
        if not isinstance(value, Node):
            return number(value)
        if value not in self.names:
            self.names[value] = self.attribute(self.held[value.name], (value,), kept=_is_integers(value))
        return self.names[value]

    def attribute(
        self, name: str, parts: tuple[Node, ...], make: Callable[..., Any] = as_it_is, kept: bool = False, weight: str = ""
    ) -> str:
        """Return how the module's own value is read that ``make`` gives of the parameters ``parts``; named after ``name``."""
        made = Attribute(parts, make, kept, weight)
        for called, known in self.attributes.items():
            if known.make is make and known.parts == parts:
                return f"self.{called}"
        called = next(iter(unique_names((name,), self.attributes)))
        self.attributes[called] = made
        return f"self.{called}"


def _is_integers(node: Node) -> bool:
    """Return whether a parameter is of narrow integers: freezing would make numbers of them, four times as large."""
    return node.meta["val"].dtype in (torch.int8, torch.uint8)


def _way_out(target: Any) -> str:
    unsettled = target is torch.ops.calque.cache_update.default
    return "add the pass cache_dynamic, which settles states" if unsettled else "use a model without it"


def unique_names(names: tuple[str, ...], taken: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield each name as one of Python's, no two the same, and none of those ``taken``."""
    seen = set(taken or ())
    for name in names:
        called = made = re.sub(r"\W", "_", name)
        count = 1
        while made in seen:
            count += 1
            made = f"{called}_{count}"
        seen.add(made)
        yield made


def write(program: ExportedProgram, model: TracedModel, own: Mapping[Any, Write] | None = None) -> Writer:
    """Return the program as TorchScript, its arguments named as the model's inputs; what cannot be written is in ``problems``."""
    return Writer(program, tuple(spec.name for spec in model.inputs), own or {})


def compiled(written: Writer, values: Mapping[str, Any]) -> torch.jit.ScriptModule:
    """Return the module that the lines are the ``forward`` of, with so named values for its attributes.

    It has types of its own, so that what is saved does not depend on what was compiled before.

    Raises:
        RuntimeError: TorchScript refuses a line.
    """
    make: Any = torch._C.ScriptModule
    module = make("__torch__.Model", torch._C.CompilationUnit(), True)
    for name, value in values.items():
        module._register_attribute(name, torch._C._jit_try_infer_type(value).type(), value)
    concrete = torch._C.ConcreteModuleType.from_jit_type(module._type())
    module._define(concrete, written.source, {"torch": torch, "math": math}.get)
    made: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(module)  # type: ignore[no-untyped-call]
    return made.eval()


def frozen(written: Writer, tensors: Mapping[Node, Tensor]) -> torch.jit.ScriptModule:
    """Return the module with its weights as constants and what follows of them worked out; integers stay integers."""
    values = {}
    for name, held in written.attributes.items():
        value = held.make(*(tensors[part] for part in held.parts))
        values[name] = value.detach() if isinstance(value, Tensor) else value
    kept = [name for name, held in written.attributes.items() if held.kept]
    kept += re.findall(r"^def (\w+)", "".join(written.methods), re.MULTILINE)
    made: torch.jit.ScriptModule = torch.jit.freeze(compiled(written, values), preserved_attrs=kept, optimize_numerics=False)
    return made
