"""From the traced graph to an ONNX model in standard operators, its weights lazy. Shared by the targets that speak ONNX.

torch.onnx translates; two things are ours. The graph goes in as it is where every operator has a translation: torch.onnx
would otherwise decompose it first, tracing it twice more, which costs several times the translation. And initializers
are replaced by lazy tensors before anything reads them, since the program's own are fake.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnx_ir.passes.common as stock
import torch
from onnxscript import opset23 as op
from torch.fx import Node

from calque.errors import Unsupported
from calque.targets import Problem
from calque.traced import TracedModel, source_of
from calque.weights import Weight, torch_dtype_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 23
ASSERTIONS = {torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg}
LOWEST = float(torch.finfo(torch.float32).min)

Table = Mapping[Any, Callable[..., Any]]

DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


def ints(*values: int) -> Any:
    """Return a constant int64 tensor."""
    return op.Constant(value_ints=list(values))


def recorded(name: str, inputs: Sequence[Any], outputs: int, domain: str = "", **attributes: Any) -> Any:
    """Return what an operator gives; a list where it has several outputs, which onnxscript's own would not have.

    It is recorded as torch.onnx's own symbolic operators are. Source: torch/onnx/_internal/exporter/_torchlib/ops/symbolic.py@2.13.
    """
    from torch.onnx._internal.exporter import _core, _tensors

    recorder = _core.current_tracer
    assert recorder is not None, "only a translation that runs may place operators"
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    made = [_tensors.SymbolicTensor(recorder.opset) for _ in range(outputs)]
    recorder.nodes.append(ir.Node(domain, name, given, ir.convenience.convert_attributes(attributes), outputs=made, version=1))
    return made[0] if outputs == 1 else made


def split_with_sizes(x: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    """Return the pieces as outputs of their own; torch.onnx would make a sequence of them."""
    return tuple(recorded("Split", [x, ints(*sizes)], len(sizes), axis=dim)) if len(sizes) > 1 else (op.Identity(x),)


def split(x: Any, size: int, dim: int = 0) -> Any:
    """Return the pieces of one size, the last of which may be smaller."""
    whole = x.shape[dim]
    return split_with_sizes(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


def attention(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float, sinks: Any, causal: bool) -> Any:
    """Return standard ``Attention``, which repeats keys and values itself; sinks, which it lacks, are written out."""
    if mask is None and causal:
        mask = lower_right(q, k)
    if sinks is None:
        return op.Attention(q, k, v, mask, scale=scale, softcap=softcap)[0]
    heads, groups, size, value_size = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    grouped = op.Reshape(q, ints(0, groups, heads // groups, -1, size))
    key = op.Transpose(op.Unsqueeze(k, ints(2)), perm=[0, 1, 2, 4, 3])
    scores = op.Mul(op.MatMul(grouped, key), op.Constant(value_float=scale))
    if softcap > 0:
        cap = op.Constant(value_float=softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    if mask is not None:
        scores = op.Where(op.Unsqueeze(mask, ints(1)), scores, op.Constant(value_float=LOWEST))
    # A sink is one more score per head and query. Adding it to zeros of the row's shape broadcasts it there.
    zeros = op.Mul(op.ReduceMax(scores, ints(-1), keepdims=1), op.Constant(value_float=0.0))
    sink = op.Add(zeros, op.Reshape(sinks, ints(1, groups, heads // groups, 1, 1)))
    weights = op.Softmax(op.Concat(scores, sink, axis=-1), axis=-1)
    weights = op.Slice(weights, ints(0), ints(-1), ints(-1))
    out = op.MatMul(weights, op.Unsqueeze(v, ints(2)))
    return op.Reshape(out, ints(0, heads, -1, value_size))


def lower_right(q: Any, k: Any) -> Any:
    """Return the causal mask of queries that are the last of the keys, bool [1, 1, Q, K]; ``is_causal`` would mean the first."""
    queries: Any = op.Squeeze(op.Shape(q, start=2, end=3))
    keys: Any = op.Squeeze(op.Shape(k, start=2, end=3))
    zero: Any = op.Constant(value_int=0)
    one: Any = op.Constant(value_int=1)
    key: Any = op.Range(zero, keys, one)
    last_seen: Any = op.Add(op.Range(zero, queries, one), op.Sub(keys, queries))
    return op.LessOrEqual(op.Unsqueeze(key, ints(0, 1, 2)), op.Unsqueeze(last_seen, ints(0, 1, 3)))


def keep_last(hidden: Any, count: Any) -> Any:
    """Return the last positions; a count of 0 starts the slice at 0 and so keeps all."""
    axis = ints(1)
    start = op.Reshape(op.Neg(count), ints(1))
    return op.Slice(hidden, start, ints(2**63 - 1), axis)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return the product with a weight that stays [out, in] because something else reads it too (a tied head)."""
    out = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return out if bias is None else op.Add(out, bias)


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """Return standard ``RMSNormalization``; without a weight, what it is made of."""
    if weight is None:
        mean = op.ReduceMean(op.Mul(x, x), ints(-1), keepdims=1)
        return op.Div(x, op.Sqrt(op.Add(mean, op.Constant(value_float=epsilon))))
    return op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)


def add_rms_norm(x: Any, residual: Any, weight: Any, epsilon: float) -> Any:
    """Return the norm of the sum, and the sum."""
    total = op.Add(x, residual)
    return rms_norm(total, weight, epsilon), total


def add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """Return the layer norm of the sum, and the sum."""
    total = op.Add(x, residual)
    return op.LayerNormalization(total, weight, bias, axis=-1, epsilon=epsilon)[0], total


def quick_gelu(x: Any, alpha: float) -> Any:
    """Return x · sigmoid(alpha · x), of which ONNX Runtime makes its QuickGelu when it loads."""
    return op.Mul(x, op.Sigmoid(op.Mul(x, op.Constant(value_float=alpha))))


def rotary(x: Any, cos: Any, sin: Any, interleaved: bool, size: int) -> Any:
    """Return standard ``RotaryEmbedding`` of [B, H, S, D]; where a part is turned, it wants both counts."""
    heads, part = (x.shape[1], size) if size != x.shape[3] else (0, 0)
    return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved), num_heads=heads, rotary_embedding_dim=part)


def flat_rotary(x: Any, cos: Any, sin: Any, interleaved: bool, size: int, heads: int) -> Any:
    """Return standard ``RotaryEmbedding`` of heads beside each other, [B, S, heads·D]."""
    part = size if size * heads != x.shape[2] else 0
    return op.RotaryEmbedding(x, cos, sin, interleaved=int(interleaved), num_heads=heads, rotary_embedding_dim=part)


def mask_bias(mask: Any) -> Any:
    """Return 0 where the mask shows a key, and the lowest number where not."""
    shown: Any = op.Constant(value_float=0.0)
    return op.Where(mask, shown, op.Constant(value_float=LOWEST))


def padding_bias(key_mask: Any, queries: Any) -> Any:
    """Return 0 where a key is no padding, and the lowest number where it is, for each query."""
    row: Any = mask_bias(op.Unsqueeze(key_mask, ints(1, 2)))
    return op.Expand(row, op.Concat(ints(1, 1), op.Shape(queries, start=1, end=2), ints(1), axis=0))


def split_heads(x: Any, heads: int) -> Any:
    """Return heads as an axis of their own; batch and sequence are taken as they are, without arithmetic on shapes."""
    return op.Reshape(x, ints(0, 0, heads, -1))


def join_heads(x: Any) -> Any:
    """Return heads beside each other; batch and sequence are taken as they are."""
    return op.Reshape(x, ints(0, 0, -1))


STANDARD: Table = {
    torch.ops.calque.flat_rotary.default: flat_rotary,
    torch.ops.calque.mask_bias.default: mask_bias,
    torch.ops.calque.padding_bias.default: padding_bias,
    torch.ops.calque.split_heads.default: split_heads,
    torch.ops.calque.join_heads.default: join_heads,
    torch.ops.calque.rms_norm.default: rms_norm,
    torch.ops.calque.add_rms_norm.default: add_rms_norm,
    torch.ops.calque.add_layer_norm.default: add_layer_norm,
    torch.ops.calque.quick_gelu.default: quick_gelu,
    torch.ops.calque.rotary.default: rotary,
    torch.ops.calque.attention_mask.default: lambda full, key_mask, kind, window: op.Identity(full),
    torch.ops.calque.attention.default: attention,
    torch.ops.calque.keep_last.default: keep_last,
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.split_with_sizes.default: split_with_sizes,
    torch.ops.aten.split.Tensor: split,
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
    return "add the pass cache_dynamic, which settles states" if unsettled else "use a model without it"


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
    for name, value in list(lowered.graph.initializers.items()):
        if name not in model.weights:
            continue
        weight = model.weights[name]
        if id(weight) in first:
            value.replace_all_uses_with(first[id(weight)])
            del lowered.graph.initializers[name]
            continue
        first[id(weight)] = value
        value.const_value = _lazy(name, weight)


def _lazy(name: str, weight: Weight) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        return ir.tensor(weight.read().contiguous(), name=name)

    return ir.LazyTensor(read, dtype=ir.DataType[DTYPES[torch_dtype_name(weight)]], shape=ir.Shape(weight.shape), name=name)


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
        stock.ClearMetadataAndDocStringPass(),
        stock.RemoveUnusedOpsetsPass(),
    ):
        rewrite(lowered)
    lowered.graph.name = "main"
