"""Programs in ATen: nothing of ours is left, and they give what the graph gave, at other lengths than those traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx import Interpreter

from calque import passes, targets
from calque.ops import decompose_attention
from calque.passes.cache_dynamic import CacheDynamic
from calque.passes.keep_last_logits import KeepLastLogits
from calque.passes.quantize_weights import QuantizeWeights
from calque.targets._aten import bind, dot_product_attention, to_aten
from tests.tiny_models import answers, prompt, traced

ATTENTION = torch.ops.calque.attention.default


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3-longrope", "bloom"])
def test_it_gives_what_the_graph_gives(name: str) -> None:
    model = traced(name)
    passes.run((QuantizeWeights(bits=8, group=0), CacheDynamic()) if name == "llama" else (CacheDynamic(),), model)
    program = bind(to_aten(model, {ATTENTION: dot_product_attention}), model)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in called if target.startswith("calque")]
    assert ("aten.scaled_dot_product_attention.default" in called) == (name not in ("gemma2", "bloom"))  # caps; its own attention
    inputs = prompt(model, 7)
    expected = answers(model, inputs)
    found = Interpreter(program.graph_module).run(*model.bind(), *[torch.from_numpy(inputs[spec.name]) for spec in model.inputs])
    for spec, value in zip(model.outputs, found, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), expected[spec.name], atol=2e-5)
    assert program.graph_module is not model.module, "the model's own graph is as it was"


def test_operators_that_are_kept_whole_stay() -> None:
    model = traced("llama")
    passes.run((CacheDynamic(),), model)
    kept = to_aten(model, whole=(ATTENTION,))
    assert sum(node.target is ATTENTION for node in kept.graph.nodes) == model.layers


@pytest.mark.parametrize(("mask", "causal"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("extra", ["", "softcap", "sinks"])
def test_attention_is_that_of_the_reference(mask: bool, causal: bool, extra: str) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((2, 4, 3, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
    seen = torch.rand(2, 1, 3, 7, generator=generator) > 0.4
    seen[..., -1] = True
    softcap, sinks = (2.0 if extra == "softcap" else 0.0), (torch.randn(4, generator=generator) if extra == "sinks" else None)
    arguments = (q, k, v, seen if mask else None, 0.3, softcap, sinks, causal)
    torch.testing.assert_close(dot_product_attention(*arguments), decompose_attention(*arguments))


@pytest.mark.parametrize("target", ["torchscript", "torchscript-lite", "aotinductor", "tensorrt"])
def test_how_many_logits_a_call_gives_is_not_left_to_values(target: str) -> None:
    model = traced("llama")
    passes.run((KeepLastLogits("dynamic"), CacheDynamic()), model)
    problems = targets.make(target, {}).problems(model)
    assert [(problem.node, "--logits last" in problem.fix) for problem in problems] == [("num_logits_to_keep", True)]
    # What that left behind belongs to its own graph.
    other = traced("llama")
    passes.run((CacheDynamic(),), other)
    assert to_aten(other).graph.nodes
