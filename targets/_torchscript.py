"""TorchScript of a program in ATen: a line for a node, sizes worked out from the inputs of each call.

::

    %size = aten.sym_size.int(%arg_0, 1)               v_size = input_ids.size(1)
    %total = operator.add(%past, %size)                v_total = v_past + v_size
    %halves = aten.split.Tensor(%x, 96, -1)            v_left, v_right = torch.ops.aten.split(v_x, 96, -1)
    %left = operator.getitem(%halves, 0)
    %turned = aten.view.default(%x, [%size, -1, 24])   v_turned = torch.ops.aten.view(v_x, [v_size, -1, 24])
    %p_norm_weight                                     self.model_norm_weight, one attribute for tied ones
    %n = aten.clone.default(%x), where nothing moves   v_x: nothing is written in place, so that no copy is needed

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
ALIASES = frozenset({aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default, aten.lift_fresh.default})
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
    aten.sym_size.int: "{}.size({})", aten.sym_stride.int: "{}.stride({})", aten.sym_numel.default: "{}.numel()",
}  # fmt: skip
# Operators whose names are no words of Python's.
DUNDER = {"__and__": "&", "__or__": "|", "__xor__": "^", "__lshift__": "<<", "__rshift__": ">>"}
# Where results of a call lie that say nothing of a CPU that computes.
SILENT = {"device": torch.device("cpu"), "layout": torch.strided, "pin_memory": False}

Write = Callable[["Writer", Node], str]


@dataclass(frozen=True)
class Attribute:
    """Something that the module holds: made of real tensors by ``make``, kept from being folded into others if ``kept``."""

    parts: tuple[Node, ...]
    make: Callable[..., Any]
    kept: bool = False


@dataclass
class Writer:
    """Lines of TorchScript, written node by node; ``own`` writes operators that are no operators of ATen.

    ``names``: what a node's value is called; ``attributes``: what the module holds, by name.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    own: Mapping[Any, Write] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    names: dict[Node, str] = field(default_factory=dict)
    attributes: dict[str, Attribute] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)

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
        """The method ``forward``."""
        given = "".join(f", {name}: Tensor" for name in self.arguments)
        return f"def forward(self{given}):\n" + "".join(f"    {line}\n" for line in self.lines)

    def _node(self, node: Node) -> None:
        if node.op == "output":
            values = [self.value(value) for value in node.args[0]]  # type: ignore[union-attr]
            self.lines.append("return " + (f"({', '.join(values)})" if len(values) > 1 else values[0]))
        elif node.op == "get_attr":
            self.names[node] = "None"  # a graph inside the graph: what calls it is refused
        elif node.op == "call_function":
            self._call(node)

    def _call(self, node: Node) -> None:
        target: Any = node.target
        if target in ASSERTIONS:
            return
        if target in ALIASES or target is aten.clone.default and _lies_the_same(node):
            self.names[node] = self.value(node.args[0])
        elif target is operator.getitem:
            self._item(node)
        else:
            self._assign(node, self.own[target](self, node) if target in self.own else self._expression(node))

    def _assign(self, node: Node, expression: str) -> None:
        """Write a line; of an operator with several results each has a name of its own."""
        results = node.meta.get("val")
        if isinstance(results, list | tuple):
            read = {user.args[1] for user in node.users if user.target is operator.getitem}
            names = [f"v_{node.name}_{at}" if at in read else "_" for at in range(len(results))]
            if len(results) == 1:
                expression = f"{expression}[0]"
            self.lines.append(f"{', '.join(names)} = {expression}")
        else:
            self.lines.append(f"v_{node.name} = {expression}")
        self.names[node] = f"v_{node.name}"

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
            if target in (math.ceil, math.floor):
                self.imports.add("math")
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

    def attribute(self, name: str, parts: tuple[Node, ...], make: Callable[..., Any] = lambda held: held, kept: bool = False) -> str:
        """Return how the module's own value is read that ``make`` gives of the parameters ``parts``; named after ``name``."""
        called = next(iter(unique_names((name,), self.attributes)))
        self.attributes[called] = Attribute(parts, make, kept)
        return f"self.{called}"


def _is_integers(node: Node) -> bool:
    """Return whether a parameter is of narrow integers: freezing would make numbers of them, four times as large."""
    return node.meta["val"].dtype in (torch.int8, torch.uint8)


def _lies_the_same(node: Node) -> bool:
    """Return whether a copy's numbers lie as those of what it copies."""
    before, after = (value.meta["val"] for value in (node.args[0], node))  # type: ignore[union-attr]
    return [str(size) for size in before.stride()] == [str(size) for size in after.stride()]


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


def compiled(written: Writer, tensors: Mapping[Node, Tensor]) -> torch.jit.ScriptModule:
    """Return the module that the lines are the ``forward`` of; parameters that are one tensor are one attribute's.

    It has types of its own, so that what is saved does not depend on what was compiled before.
    """
    unit = torch._C.CompilationUnit()
    module = torch._C.ScriptModule("__torch__.Model", unit, True)
    for name, held in written.attributes.items():
        made = held.make(*(tensors[part] for part in held.parts))
        inferred = torch._C._jit_try_infer_type(made)
        module._register_attribute(name, inferred.type(), made.detach() if isinstance(made, Tensor) else made)
    known = {"torch": torch, "math": math}
    concrete = torch._C.ConcreteModuleType.from_jit_type(module._type())
    module._define(concrete, written.source, known.get)
    made_module: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(module)
    return made_module.eval()


def frozen(written: Writer, tensors: Mapping[Node, Tensor]) -> torch.jit.ScriptModule:
    """Return the module with its weights as constants and what follows of them worked out; integers stay integers."""
    kept = [name for name, held in written.attributes.items() if held.kept]
    made: torch.jit.ScriptModule = torch.jit.freeze(compiled(written, tensors), preserved_attrs=kept)
    return made
