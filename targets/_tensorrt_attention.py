"""What TensorRT makes of attention, of slots and of rotary embeddings that it should not, and what it has kernels for.

Source: onnx-tensorrt 11.1, docs/operators.md and docs/TRT_custom_ops.md; what the parser and the builder of TensorRT-RTX 1.7.1
were seen to do, which the tests hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from calque.targets._tensorrt_typed import constant, dims, from_slots, given, last, number

# The rule, what is wrong, and the way out.
Fault = tuple[str, str, str]

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
CACHED = (*NARROW, ir.DataType.FLOAT)
WRITTEN_OUT = "write this attention out as MatMul and Softmax"
MASKED = "give it a mask, bool [B, 1, S, K], or set attention: trt, which is told lengths"
OWN_INPUTS, LENGTHS = 6, 5


def fused(head: int, value: int, dtype: ir.DataType, hidden: bool = True) -> bool:
    """Return whether the builder has one kernel for attention over heads of that size; ``hidden``: a mask or lengths hide keys.

    Source: sizes from 1 to 512, tried on the builder of TensorRT-RTX 1.7.1: with a mask or with lengths it takes multiples of 8
    from 16 to 256, with neither every size from 9 to 256; float32 never, and never values of another size than keys.
    """
    if dtype not in NARROW or value != head:
        return False
    return 16 <= head <= 256 and head % 8 == 0 if hidden else 8 < head <= 256


def attention(node: ir.Node) -> Iterator[Fault]:
    """Yield what is wrong with standard ``Attention``."""
    if given(node, 6) is not None:
        yield "attention-lengths", "nonpad_kv_seqlen is dropped without a word: slots that are empty would be attended to", MASKED
    if given(node, 4) is not None or given(node, 5) is not None or any(output.name for output in node.outputs[1:3]):
        yield "attention-past", "past and present keys and values are refused", "use a static cache, whose slots are written before"
    if any(output.name for output in node.outputs[3:]):
        yield "attention-scores", "qk_matmul_output is refused", WRITTEN_OUT
    if number(node, "softcap", 0.0) != 0.0:
        yield "attention-softcap", "softcap is refused", WRITTEN_OUT
    if number(node, "softmax_precision", None) is not None:
        yield "attention-precision", "softmax_precision is refused", "leave it out: the kernel adds up in float32"
    yield from _causal(node, bool(number(node, "is_causal")))
    yield from _kernel(node, given(node, 3) is not None)


def own_attention(node: ir.Node) -> Iterator[Fault]:
    """Yield what is wrong with ``TRT_Attention``."""
    ignored = [name for name in ("is_causal", "scale", "softcap", "softmax_precision") if name in node.attributes]
    if ignored:
        way_out = "multiply the queries by the scale beforehand, and say causal_kind"
        yield "attention-ignored", f"TRT_Attention ignores {', '.join(ignored)} without a word", way_out
    if any(value is not None for value in node.inputs[OWN_INPUTS:]):
        way_out = f"kv_lengths is input {LENGTHS}"
        yield "attention-lengths", f"inputs after the {OWN_INPUTS}th are dropped without a word, lengths among them", way_out
    kind = number(node, "causal_kind", "none")
    if kind != "none" and given(node, 3) is not None:
        yield "attention-mask", f"a mask beside causal_kind {kind} is refused", "leave one of the two out"
    if kind == "upper_left":
        yield from _causal(node, True)
    yield from _kernel(node, given(node, 3) is not None or given(node, LENGTHS) is not None)


def _causal(node: ir.Node, causal: bool) -> Iterator[Fault]:
    """Yield where the first query would be taken for that of the first key, and is not."""
    if not causal:
        return
    if given(node, 3) is not None and node.op_type == "Attention":
        yield "attention-mask", "a mask beside is_causal is refused", "leave is_causal out and let the mask say it"
        return
    query, key = dims(given(node, 0)), dims(given(node, 1))
    same = query is not None and key is not None and query[-2] is not None and query[-2] == key[-2]
    if from_slots(given(node, 1)) or not same:
        why = "causal is upper-left to TensorRT: the first query sees the first key alone, whatever stands in the slots before it"
        yield "attention-causal", why, MASKED


def _kernel(node: ir.Node, hidden: bool) -> Iterator[Fault]:
    """Yield where the builder would find no kernel, and may not do without."""
    query, key, value = (given(node, place) for place in range(3))
    if query is None or query.dtype is None or number(node, "TRT_decomposable"):
        return
    sizes = [_head(node, tensor, name) for tensor, name in ((query, "q_num_heads"), (key, "kv_num_heads"), (value, "kv_num_heads"))]
    if sizes[0] is None or sizes[2] is None or fused(sizes[0], sizes[2], query.dtype, hidden):
        return
    of = f"heads of {sizes[0]}" + (f" and values of {sizes[2]}" if sizes[2] != sizes[0] else "")
    yield "attention-kernel", f"the builder has no kernel for attention over {of} in {query.dtype.name}", WRITTEN_OUT


def _head(node: ir.Node, tensor: ir.Value | None, heads: str) -> int | None:
    known, size = dims(tensor), last(tensor)
    if known is None or size is None or len(known) == 4:
        return size
    count = number(node, heads)
    return size // count if count else None


def slots(node: ir.Node, longest: int) -> Iterator[Fault]:
    """Yield what is wrong with a write into slots; ``longest``: how many tokens a call may bring, 0 if that is not known."""
    cache, written = given(node, 0), node.outputs[0]
    known, new = dims(cache), dims(given(node, 1))
    static = "let a static cache hold keys and values: graph inputs [B, H, slots, D], written on the axis of slots"
    if cache is None or not cache.is_graph_input():
        yield "slots-input", "the slots that are written must be an input of the graph", static
    if not written.is_graph_output():
        yield "slots-output", "the slots that were written must be an output of the graph", static
    if cache is not None and cache.dtype is not None and cache.dtype not in CACHED:
        yield "slots-type", f"slots cannot be {cache.dtype.name}", "keep keys and values in float16, bfloat16 or float32"
    if number(node, "mode", "linear") != "linear":
        yield "slots-mode", f"mode {number(node, 'mode')} is refused: writes are linear", static
    if known is None:
        yield "slots-axis", "how many slots there are is not known", static
        return
    if len(known) != 4 or number(node, "axis", -2) not in (-2, 2):
        yield "slots-axis", f"axis {number(node, 'axis', -2)} of {len(known)} is refused: slots are the last but one of four", static
    elif not isinstance(known[-2], int):
        yield "slots-axis", "the number of slots must be a number", static
    else:
        longest = new[-2] if new and isinstance(new[-2], int) else longest
        if longest > known[-2]:
            why = f"a call of {longest} tokens goes past the {known[-2]} slots, where writes are ignored without a word"
            yield "slots-overflow", why, "let profiles go no further than dims.max_length"


def rotary(node: ir.Node) -> Iterator[Fault]:
    """Yield what is wrong with ``RotaryEmbedding``."""
    x, table = dims(given(node, 0)), dims(given(node, 1))
    if x and table and given(node, 3) is None and len(table) == 3 and isinstance(table[0], int) and x[0] != table[0]:
        why = f"cosines of batch {table[0]} beside an input of batch {x[0]}: a table must have the input's batch"
        yield "rotary-batch", why, "expand cosines and sines to the batch, or give a table [positions, D/2] and position_ids"


def top(node: ir.Node) -> Iterator[Fault]:
    """Yield where ``TopK`` asks for more than a layer gives. Source: ITopKLayer."""
    count = constant(given(node, 1))
    if count is not None and count.size and int(count.max()) > 3840:
        yield "topk", f"the {int(count.max())} largest are asked for, 3840 at most are given", "ask for fewer"
