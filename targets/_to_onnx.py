"""From the traced graph to an ONNX model, its weights lazy. Shared by the targets that speak ONNX.

torch.onnx translates; two things are ours. The graph goes in as it is where every operator has a translation: torch.onnx
would otherwise decompose it first, tracing it twice more, which costs several times the translation. And initializers
are replaced by lazy tensors before anything reads them, since the program's own are fake.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO

import onnx_ir as ir
import onnx_ir.passes.common as stock
import torch
from torch.fx import Node

from calque.errors import Unsupported
from calque.targets import Problem
from calque.targets._standard import SLOTS, SLOTS_OPSET, STANDARD, Table
from calque.traced import TracedModel, four_bit_parameters, source_of
from calque.weights import Weight, pieces, torch_dtype_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 23
# The key in a node's ``meta`` of its module path and its line of the model's source.
SOURCE = "calque.source"
ASSERTIONS = {torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg}
DTYPES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "float8_e4m3fn": "FLOAT8E4M3FN",
}


@cache
def translated() -> frozenset[Any]:
    """Return the operators that torch.onnx has a direct translation for."""
    from torch.onnx._internal.exporter import _decomp, _registration

    with _quiet():
        known = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    return frozenset(_decomp.get_onnx_implemented_overloads(known))


def untranslated(program: ExportedProgram, table: Table) -> list[Node]:
    """Return the nodes whose operator neither torch.onnx nor ``table`` translates as it stands."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)]
    return [node for node in nodes if node.target not in table and node.target not in translated()]


def problems(model: TracedModel, table: Table) -> list[Problem]:
    """Return the nodes that have neither a translation nor a decomposition into what has one."""
    program = model.program
    missing = untranslated(program, table)
    if missing and all(node.target.namespace == "aten" for node in missing):  # type: ignore[union-attr]
        with _quiet(), _explained(model):
            missing = untranslated(_decomposed(program, table), table)
    return [Problem(node.name, *source_of(node), f"{node.target} has no ONNX translation", _way_out(node)) for node in missing]


def _way_out(node: Node) -> str:
    unsettled = node.target is torch.ops.calque.cache_update.default
    return "add the pass cache_dynamic or cache_static, which settle states" if unsettled else "use a model without it"


def to_onnx(model: TracedModel, table: Table = STANDARD) -> ir.Model:
    """Return the graph as an ONNX model with the names of ``model.inputs`` and ``outputs``; weights are read when written."""
    program = model.program
    if untranslated(program, table):
        with _quiet(), _explained(model):
            program = _decomposed(program, table)
    with _quiet(), _as_it_is(program), _explained(model):
        exported = torch.onnx.export(
            program, args=(), custom_translation_table=dict(table), dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )  # fmt: skip
    assert exported is not None
    lowered: ir.Model = exported.model
    _bind_weights(lowered, model)
    _name(lowered, model)
    _simplify(lowered)
    return lowered


@contextmanager
def _explained(model: TracedModel) -> Iterator[None]:
    """Turn a failed translation into an error that names the node, its module and its source line."""
    from torch.onnx.errors import OnnxExporterError

    try:
        yield
    except OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = f"{error}\n{error.__cause__ or ''}"
        nodes = [node for node in model.graph.nodes if node.op == "call_function" and f"%{node.name} :" in text]
        where = [f"{node.name} ({node.target}) in {' '.join(part for part in source_of(node) if part)}" for node in nodes]
        first = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise Unsupported(
            "torch.onnx cannot translate the graph", [*where, first], "the model uses what ONNX has no operator for"
        ) from error


def _decomposed(program: ExportedProgram, table: Table) -> ExportedProgram:
    """Return the program with what has no translation decomposed into what has; this traces the whole graph again."""
    from torch.onnx._internal.exporter import _decomp

    decomposed: ExportedProgram = program.run_decompositions(_decomp.create_onnx_friendly_decomposition_table({*translated(), *table}))
    # Tracing again puts torch's assertions on sizes back, which say nothing of the result.
    for node in [node for node in decomposed.graph.nodes if node.target in ASSERTIONS and not node.users]:
        decomposed.graph.erase_node(node)
    decomposed.graph.eliminate_dead_code()
    return decomposed


@contextmanager
def _as_it_is(program: ExportedProgram) -> Iterator[None]:
    """Make torch.onnx take the program without tracing it again.

    It would decompose it, and run it once more to make type promotions explicit. The first was seen to beforehand; the
    second is left to it wherever a promotion could be needed at all.
    """
    from torch.onnx._internal.exporter import _fx_passes

    promote = _fx_passes.insert_type_promotion_nodes
    program.run_decompositions = lambda *_: program
    if not any(_may_promote(node) for node in program.graph.nodes):
        _fx_passes.insert_type_promotion_nodes = _leave_alone
    try:
        yield
    finally:
        _fx_passes.insert_type_promotion_nodes = promote
        del program.run_decompositions


def _leave_alone(graph_module: torch.fx.GraphModule) -> None:
    """Insert nothing."""


@cache
def _promoting() -> Any:
    from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable

    return TypePromotionTable()


def _may_promote(node: Node) -> bool:
    """Return whether an operator that promotes types is given types that differ from each other or from its result."""
    if (
        node.op != "call_function"
        or not isinstance(node.target, torch._ops.OpOverload)
        or _promoting().get_rule(node.target.overloadpacket) is None
    ):
        return False
    dtypes = {tensor.dtype for argument in node.all_input_nodes if isinstance(tensor := argument.meta.get("val"), torch.Tensor)}
    if node.target in (torch.ops.aten.where.self, torch.ops.aten.masked_fill.Scalar):
        dtypes -= {torch.bool}
    scalars = {type(argument) for argument in node.args if isinstance(argument, float | complex)}
    result = node.meta["val"].dtype
    mixed = len(dtypes) > 1 or (scalars and not any(dtype.is_floating_point for dtype in dtypes))
    return bool(mixed or (dtypes and result != torch.bool and result not in dtypes))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx's notes on missing optional packages off the user's terminal."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _bind_weights(lowered: ir.Model, model: TracedModel) -> None:
    """Make every initializer read its bytes from the weight table when it is written; tied names become one."""
    first: dict[int, ir.Value] = {}
    narrow = four_bit_parameters(model)
    for name, value in list(lowered.graph.initializers.items()):
        if name not in model.weights:
            continue
        weight = model.weights[name]
        if id(weight) in first:
            value.replace_all_uses_with(first[id(weight)])
            del lowered.graph.initializers[name]
            continue
        first[id(weight)] = value
        value.const_value = _InPieces(name, weight, ir.DataType.INT4 if name in narrow else ir.DataType[DTYPES[torch_dtype_name(weight)]])
        value.dtype = value.const_value.dtype


class _InPieces(ir.LazyTensor):
    """A weight that is written some rows at a time, so that a large one is never whole in memory; of INT4, whole."""

    def __init__(self, name: str, weight: Weight, dtype: ir.DataType) -> None:
        def read() -> ir.TensorProtocol:
            tensor = weight.read().contiguous()
            return ir.Tensor(tensor.numpy().astype(dtype.numpy()), name=name) if dtype == ir.DataType.INT4 else ir.tensor(tensor, name=name)

        super().__init__(read, dtype=dtype, shape=ir.Shape(weight.shape), name=name)
        self._weight = weight

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes of all rows, in order. Numbers lie in files as in memory: little-endian machines alone run torch."""
        if self.dtype == ir.DataType.INT4:
            return super().tofile(file)
        for piece in pieces(self._weight):
            file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _name(lowered: ir.Model, model: TracedModel) -> None:
    """Give inputs and outputs their names and named dimensions; drop inner shapes, whose symbols mean nothing outside."""
    graph = lowered.graph
    for node in graph:
        for value in node.outputs:
            value.shape = None
    for values, specs in ((graph.inputs, model.inputs), (graph.outputs, model.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.name = spec.name
            value.shape = ir.Shape(spec.shape)


class _KeepSources(ir.passes.InPlacePass):
    """Each node knows the module and the source line that it came from in ``meta[SOURCE]``, which no file is written from."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Read them from what torch.onnx writes to files, paths of this machine among it, before that is cleared."""
        for node in model.graph.all_nodes():
            if place := _place(node.metadata_props):
                node.meta[SOURCE] = place
        return ir.passes.PassResult(model, modified=False)


def _place(written: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the module path and the last line that is not torch's own; None of a node that stands nowhere in the model.

    Source: torch/onnx/_internal/exporter/_core.py@2.13, the keys of ``_set_node_metadata``.
    """
    scopes = ast.literal_eval(written.get("pkg.torch.onnx.name_scopes", "[]"))
    lines = [line.strip() for line in written.get("pkg.torch.onnx.stack_trace", "").splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/torch/" not in line.replace("\\", "/")] or lines
    # The last scope is the node's own.
    return (scopes[-2] if len(scopes) > 1 else "", own[-1]) if own else None


def _simplify(lowered: ir.Model) -> None:
    """Fold constants and remove what is doubled or unused, with stock passes.

    onnxscript's rewrite rules are left out: on graphs this clean they find nothing, in most of the time that lowering takes.
    """
    from onnxscript import optimizer

    stock.InlinePass()(lowered)
    optimizer.fold_constants(lowered, onnx_shape_inference=False, input_size_limit=1024, output_size_limit=4096)
    for rewrite in (
        stock.IdentityEliminationPass(),
        stock.RemoveUnusedNodesPass(),
        stock.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        stock.DeduplicateInitializersPass(),
        stock.CommonSubexpressionEliminationPass(),
        stock.RemoveUnusedNodesPass(),
        stock.OutputFixPass(),
        stock.NameFixPass(),
        _KeepSources(),
        stock.ClearMetadataAndDocStringPass(),
        stock.RemoveUnusedOpsetsPass(),
    ):
        rewrite(lowered)
    if any(node.op_type == SLOTS for node in lowered.graph):
        # 24 only added types to what 23 has: the other operators mean the same.
        lowered.opset_imports[""] = SLOTS_OPSET
    lowered.graph.name = "main"
