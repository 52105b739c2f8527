"""A traced model: the graph, its inputs and outputs by name, its states, and the table its weights come from.

The graph is an ``ExportedProgram`` whose parameters are fake. This file is the only one that adds, renames or drops
parameters, inputs and outputs, so that the program's signature, the weight table and the I/O names stay one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings
from torch.utils import _pytree as pytree

from calque import expert_ops, ops, panel_ops, quantized_ops, slot_ops  # noqa: F401  # register torch.ops.calque
from calque.artifact import Limits, TensorSpec
from calque.states import StateSpec
from calque.weights import Derived, Weight, WeightTable, narrowed_scale, rounded, torch_dtype_name

if TYPE_CHECKING:
    from sympy import Symbol
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import ExportedProgram


@dataclass
class TracedModel:
    """One graph and everything a target needs to know of it.

    ``inputs`` and ``outputs`` name the user inputs and outputs of ``program`` in order. Before a cache pass ran,
    ``settled`` is False: ``inputs`` ends with the abstract state placeholders, one per ``StateSpec``, and the only
    output is ``logits``.
    """

    program: ExportedProgram
    weights: WeightTable
    states: tuple[StateSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Limits
    settled: bool = False
    trained_length: int | None = None
    # Parameters of the untouched model that a pass gave other values: by name, what it would hold to compute the same.
    replaced: dict[str, Weight] = field(default_factory=dict)
    # What becomes of the values that the product with a parameter reads, by the parameter's name, where runtimes round them.
    rounding: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    # Rows of tokens that the model is measured on, with what the tokenizer puts around a text; none without calibration.
    samples: tuple[tuple[int, ...], ...] = ()
    # What was measured on them, by what was asked: the traces of one conversion share it, so that they all get the same integers.
    calibrations: dict[Any, Any] = field(default_factory=dict)
    # A folder for what measuring keeps in files; None: the system's own.
    scratch: Path | None = None
    # Parameters that the checkpoint holds in another form than numbers: by name, that form and what becomes of it, in words.
    quantized: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many decoder layers keep a state."""
        return len({state.layer for state in self.states})

    @property
    def module(self) -> GraphModule:
        """The graph module of the program."""
        module: GraphModule = self.program.graph_module
        return module

    @property
    def graph(self) -> torch.fx.Graph:
        """The graph of the program."""
        return self.module.graph

    def _nodes_by_name(self) -> dict[str, Node]:
        """Return every placeholder by its name in the graph, in order."""
        return {node.name: node for node in self.graph.nodes if node.op == "placeholder"}

    def placeholders(self) -> dict[str, Node]:
        """Return the placeholder of every user input by its name in the artifact."""
        nodes = self._nodes_by_name()
        user = [spec.arg.name for spec in self.program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
        return {spec.name: nodes[name] for spec, name in zip(self.inputs, user, strict=True)}

    def parameters(self) -> dict[str, Node]:
        """Return the placeholder of every parameter and buffer that has an entry in the weight table."""
        nodes = self._nodes_by_name()
        specs = self.program.graph_signature.input_specs
        return {spec.target: nodes[spec.arg.name] for spec in specs if spec.target is not None and spec.target in self.weights}

    def constants(self) -> dict[Node, str]:
        """Return the name of every buffer and lifted constant whose value is part of the graph, by its placeholder."""
        nodes = self._nodes_by_name()
        specs = self.program.graph_signature.input_specs
        return {nodes[spec.arg.name]: spec.target for spec in specs if spec.target is not None and spec.target not in self.weights}

    def output_node(self) -> Node:
        """Return the graph's one output node."""
        last: Node = next(iter(reversed(self.graph.nodes)))
        return last

    def add_output(self, node: Node, spec: TensorSpec) -> None:
        """Make ``node`` the last output, named ``spec.name``."""
        output = self.output_node()
        output.args = ((*output.args[0], node),)  # type: ignore[misc]
        signature = self.program.graph_signature
        signature.output_specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), target=None))
        self.outputs = (*self.outputs, spec)
        self._rebuild_call_spec()

    def keep_outputs(self, kept: Sequence[int]) -> None:
        """Leave the outputs at those places alone, in that order."""
        output = self.output_node()
        output.args = (tuple(output.args[0][i] for i in kept),)  # type: ignore[index]
        specs = self.program.graph_signature.output_specs
        specs[:] = [specs[i] for i in kept]
        self.outputs = tuple(self.outputs[i] for i in kept)
        self._rebuild_call_spec()

    def add_input(self, spec: TensorSpec, value: torch.Tensor, before: str | None = None) -> Node:
        """Return a new user input named ``spec.name``, the last or ``before`` another; ``value`` is fake, of the program's own mode."""
        nodes, names = self.placeholders(), [known.name for known in self.inputs]
        place = names.index(before) if before else len(names)
        last = nodes[names[place]].prev if before else [*self._nodes_by_name().values()][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(spec.name)
        node.meta["val"] = value
        specs = self.program.graph_signature.input_specs
        users = [i for i, known in enumerate(specs) if known.kind == InputKind.USER_INPUT]
        specs.insert(users[place] if before else len(specs), InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), target=None))
        self.inputs = (*self.inputs[:place], spec, *self.inputs[place:])
        self._rebuild_call_spec()
        return node

    def drop_input(self, name: str) -> None:
        """Leave the model without a user input that nothing reads."""
        node = self.placeholders()[name]
        specs = self.program.graph_signature.input_specs
        specs[:] = [spec for spec in specs if spec.arg.name != node.name]
        self.graph.erase_node(node)
        self.inputs = tuple(spec for spec in self.inputs if spec.name != name)
        self._rebuild_call_spec()

    def rename_inputs(self, names: dict[str, TensorSpec]) -> None:
        """Give the inputs in ``names`` the specs they map to."""
        self.inputs = tuple(names.get(spec.name, spec) for spec in self.inputs)

    def add_parameter(self, name: str, weight: Weight, like: Node) -> Node:
        """Return a placeholder for a new parameter whose bytes ``weight`` gives; put before ``like``."""
        with self.graph.inserting_before(like):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        fake = like.meta["val"]
        dtype = getattr(torch, weight.dtype) if isinstance(weight, Derived) else fake.dtype
        node.meta["val"] = fake.new_empty(weight.shape, dtype=dtype)
        specs = self.program.graph_signature.input_specs
        place = next(i for i, spec in enumerate(specs) if spec.arg.name == like.name)
        specs.insert(place, InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), target=name))
        self.program.state_dict[name] = torch.nn.Parameter(node.meta["val"], requires_grad=False)
        self.weights.entries[name] = weight
        return node

    def cast_weights(self, dtype: str, computed: bool = True, scales: Collection[str] = (), kept: Collection[str] = ()) -> int:
        """Return how many weights, float32 until now, are in ``dtype`` (torch's name); what reads them is as it was.

        Weights are parameters: buffers hold what a model counts with, and stay as they are. Tied ones stay one. What is
        computed of weights is computed of rounded ones; it stays float32 itself unless ``computed``. ``scales`` names those of
        integers, none of which becomes 0; ``kept`` what stays as it is.
        """
        narrow: torch.dtype = getattr(torch, dtype)
        nodes, made = self._nodes_by_name(), dict[int, Weight]()
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            if spec.kind != InputKind.PARAMETER or spec.target not in self.weights or node.meta["val"].dtype != torch.float32:
                continue
            weight, scale = self.weights[spec.target], spec.target in scales
            narrowed = made.get(id(weight)) or (narrowed_scale(weight, dtype) if scale else rounded(weight, dtype, computed))
            if narrowed is weight or spec.target in kept:
                continue
            self.weights.entries[spec.target] = made[id(weight)] = narrowed
            if torch_dtype_name(narrowed) != dtype:
                continue
            node.meta["val"] = node.meta["val"].to(narrow)
            self.program.state_dict[spec.target] = torch.nn.Parameter(node.meta["val"], requires_grad=False)
        return len(made)

    def cast_states(self, dtype: str) -> int:
        """Return how many states, float32 until now, are in ``dtype`` (torch's name); what reads and makes them is as it was."""
        states = [state for state in self.states if state.dtype == "float32"]
        placeholders = self.placeholders()
        for state in states:
            node = placeholders[state.input]
            node.meta["val"] = node.meta["val"].to(getattr(torch, dtype))
        names = {name for state in states for name in (state.input, state.output)}
        self.inputs, self.outputs = (
            tuple(replace(spec, dtype=dtype) if spec.name in names else spec for spec in specs) for specs in (self.inputs, self.outputs)
        )
        self.states = tuple(replace(state, dtype=dtype) if state in states else state for state in self.states)
        return len(states)

    def drop_unused_parameters(self) -> int:
        """Return how many parameters and buffers were dropped because nothing reads them."""
        specs = self.program.graph_signature.input_specs
        nodes = self._nodes_by_name()
        unused = [spec for spec in specs if spec.kind != InputKind.USER_INPUT and not nodes[spec.arg.name].users]
        for spec in unused:
            specs.remove(spec)
            self.graph.erase_node(nodes[spec.arg.name])
            self.program.state_dict.pop(spec.target, None)
            self.program.constants.pop(spec.target, None)
            self.weights.entries.pop(spec.target, None)
        return len(unused)

    def finish_rewrite(self) -> None:
        """Leave a graph without dead nodes, linted, whose signature names its own nodes.

        The module's code is left as it was: everything here runs or translates the graph, and writing code takes longer
        than most passes. Who calls the module recompiles it.

        Raises:
            AssertionError: a pass left signature and graph apart.
        """
        self.graph.eliminate_dead_code()
        self.graph.lint()
        signature = self.program.graph_signature
        assert [*self._nodes_by_name()] == [spec.arg.name for spec in signature.input_specs], "inputs and signature differ"
        returned: Any = self.output_node().args[0]
        assert len(self.outputs) == len(signature.output_specs) == len(returned), "outputs and their names differ"
        for spec, node in zip(signature.output_specs, returned, strict=True):
            spec.arg = TensorArgument(name=node.name)

    def propagate(self, size: Symbol) -> None:
        """No fake value has ``size`` in its shape: those that had follow anew from the inputs, which a pass has given others."""
        mode = self.placeholders()["input_ids"].meta["val"].fake_mode
        for node in self.graph.nodes:
            sizes = [part for leaf in pytree.tree_leaves(node.meta.get("val")) for part in getattr(leaf, "shape", (leaf,))]
            if node.op == "call_function" and any(isinstance(part, torch.SymInt) and part.node.expr.has(size) for part in sizes):
                refresh(node, mode)

    def _rebuild_call_spec(self) -> None:
        entry = self.program.module_call_graph[0].signature
        assert entry is not None
        flat_inputs = tuple(range(len(self.inputs)))
        entry.in_spec = pytree.tree_structure((flat_inputs, {}))
        entry.out_spec = pytree.tree_structure(tuple(range(len(self.outputs))))
        entry.forward_arg_names = None  # of the model's own forward

    def bind(self) -> list[torch.Tensor]:
        """Return the real tensor of every parameter, buffer and constant, in the order of the placeholders.

        Reads every weight: for small models and for runtimes that embed weights.
        """
        cache: dict[int, torch.Tensor] = {}
        tensors = []
        for spec in self.program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                continue
            name = spec.target
            assert name is not None
            if name in self.weights:
                weight = self.weights[name]
                if id(weight) not in cache:
                    cache[id(weight)] = weight.read()
                tensors.append(cache[id(weight)])
            else:
                tensors.append(self.constant(name))
        return tensors

    def constant(self, name: str) -> torch.Tensor:
        """Return a buffer or lifted constant that no checkpoint holds: its value is part of the graph."""
        held = self.program.constants if name in self.program.constants else self.program.state_dict
        value: torch.Tensor = held[name]
        return value

    def copy(self) -> TracedModel:
        """Return a model whose graph can be rewritten without touching this one; weights are shared."""
        import copy

        program = copy.copy(self.program)
        program._graph_module = copy.deepcopy(self.module)
        program._graph_signature = copy.deepcopy(self.program.graph_signature)
        # Shallow: only the specs of the first entry's signature are ever assigned, and specs themselves never change.
        entries = [copy.copy(entry) for entry in self.program.module_call_graph]
        entries[0].signature = copy.copy(entries[0].signature)
        program._module_call_graph = entries
        program._state_dict = dict(self.program.state_dict)
        program._constants = dict(self.program.constants)
        return replace(
            self,
            program=program,
            weights=replace(self.weights, entries=dict(self.weights.entries)),
            replaced=dict(self.replaced),
            rounding=dict(self.rounding),
            quantized=dict(self.quantized),
        )


def source_of(node: Node) -> tuple[str, str]:
    """Return the module path in the HF model and the line of its source that a node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    module = list(stack.values())[-1][0] if stack else ""
    trace: str = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    return module, lines[-1] if lines else ""


def user_nodes(nodes: Iterable[Node], target: Any) -> list[Node]:
    """Return the call_function nodes of ``target``, in graph order."""
    return [node for node in nodes if node.op == "call_function" and node.target is target]


def four_bit_parameters(model: TracedModel) -> set[str]:
    """Return the names of parameters, int8 on the graph, that targets store as integers of 4 bits."""
    names = {node: name for name, node in model.parameters().items()}
    targets = (torch.ops.calque.dequantize_weight.default, torch.ops.calque.dequantize_linear.default)
    nodes = [node for target in targets for node in user_nodes(model.graph.nodes, target) if node.args[3] == 4]
    return {names[part] for node in nodes for part in (node.args[0], node.args[2]) if part in names}  # type: ignore[index]


def call(graph: torch.fx.Graph, target: Any, *args: Any, **keywords: Any) -> Node:
    """Return a new node at the graph's insertion point that calls ``target``; it stands where its first argument does.

    An input of the graph stands nowhere, which is a stack of no modules: torch's exporter warns of a node without one.
    """
    node = graph.call_function(target, args, keywords)
    above = node.all_input_nodes[0].meta
    node.meta = {"nn_module_stack": {}, **{key: above[key] for key in ("nn_module_stack", "stack_trace") if key in above}}
    refresh(node)
    return node


def refresh(node: Node, mode: FakeTensorMode | None = None) -> None:
    """Recompute the fake value of a node from its arguments, in the program's own fake mode: given, or that of an argument."""
    arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    mode = mode or next(value for value in pytree.tree_leaves(arguments) if hasattr(value, "fake_mode")).fake_mode
    with mode, enable_python_dispatcher():  # as while tracing: some shapes are worked out in Python alone
        node.meta["val"] = node.target(*arguments, **keywords)  # type: ignore[operator]
    # A size that values decide belongs to this node from now on; left pending, whatever traces next would be asked for it.
    if mode.shape_env is not None and (bindings := compute_unbacked_bindings(mode.shape_env, node.meta["val"])):
        node.meta["unbacked_bindings"] = bindings
