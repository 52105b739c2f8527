from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.export.graph_signature import InputKind

from calque.artifact import TensorSpec
from calque.traced import TracedModel, source_of, user_nodes
from calque.weights import transpose
from tests.tiny_models import VOCABULARY, answers, prompt, shared_trace, traced

aten = torch.ops.aten


def signature_names(model: TracedModel) -> list[str]:
    return [spec.arg.name for spec in model.program.graph_signature.input_specs]


def placeholder_names(model: TracedModel) -> list[str]:
    return [node.name for node in model.graph.nodes if node.op == "placeholder"]


def test_inputs_outputs_and_states_have_the_names_of_the_contract() -> None:
    model = traced("llama")
    states = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert list(model.placeholders()) == ["input_ids", "attention_mask", "position_ids", *states]
    assert [spec.name for spec in model.outputs] == ["logits"]
    assert model.outputs[0].shape == ("batch_size", "sequence_length", VOCABULARY)
    assert not model.settled
    assert model.layers == 2


def test_parameters_are_fake_and_have_an_entry_each() -> None:
    model = traced("llama")
    model.weights.check()
    parameters = model.parameters()
    assert parameters.keys() == model.weights.entries.keys()
    assert all(isinstance(node.meta["val"], torch._subclasses.FakeTensor) for node in parameters.values())
    assert all(tuple(node.meta["val"].shape) == model.weights[name].shape for name, node in parameters.items())


def test_added_output_is_the_last_and_runs() -> None:
    model = traced("llama")
    hidden = user_nodes(model.graph.nodes, aten.linear.default)[-1].args[0]
    assert isinstance(hidden, torch.fx.Node)
    model.add_output(hidden, TensorSpec("hidden", "float32", ("batch_size", "sequence_length", 64)))
    model.finish_rewrite()
    outputs = answers(model, prompt(model))
    assert list(outputs)[:2] == ["logits", "hidden"]
    assert outputs["hidden"].shape == (2, 5, 64)


def test_added_input_is_the_last_and_runs() -> None:
    model = traced("llama")
    logits = model.output_node().args[0][0]  # type: ignore[index]
    assert isinstance(logits, torch.fx.Node)
    with logits.meta["val"].fake_mode:
        value = torch.empty(())
    added = model.add_input(TensorSpec("scale", "float32", ()), value)
    with model.graph.inserting_after(logits):
        scaled = model.graph.call_function(aten.mul.Tensor, (logits, added))
    scaled.meta = dict(logits.meta)
    logits.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    model.finish_rewrite()
    assert list(model.placeholders())[-1] == "scale"
    inputs = prompt(model)
    plain = answers(traced("llama"), inputs)["logits"]
    twice = answers(model, {**inputs, "scale": np.array(2, dtype=np.float32)})["logits"]
    np.testing.assert_array_equal(twice, plain * 2)


def test_program_stays_callable_by_torch_after_inputs_and_outputs_were_added() -> None:
    model = traced("llama")
    model.add_output(user_nodes(model.graph.nodes, torch.ops.calque.cache_update.default)[0], TensorSpec("k", "float32", ()))
    model.finish_rewrite()
    model.program.validate()  # type: ignore[no-untyped-call]


def test_renamed_input_keeps_its_place() -> None:
    model = traced("llama")
    before = list(model.placeholders().values())
    model.rename_inputs({"position_ids": TensorSpec("positions", "int64", ("batch_size", "sequence_length"))})
    assert list(model.placeholders())[:3] == ["input_ids", "attention_mask", "positions"]
    assert list(model.placeholders().values()) == before


def test_added_parameter_has_a_signature_entry_a_weight_and_its_bytes() -> None:
    model = traced("llama")
    name, like = "model.layers.0.mlp.up_proj.weight", model.parameters()["model.layers.0.mlp.up_proj.weight"]
    weight = transpose(model.weights[name])
    added = model.add_parameter(f"{name}.transposed", weight, like)
    assert tuple(added.meta["val"].shape) == (64, 96)
    assert added.meta["val"].fake_mode is like.meta["val"].fake_mode
    assert signature_names(model) == placeholder_names(model)
    spec = next(spec for spec in model.program.graph_signature.input_specs if spec.arg.name == added.name)
    assert (spec.kind, spec.target) == (InputKind.PARAMETER, f"{name}.transposed")
    place = signature_names(model).index(added.name)
    assert torch.equal(model.bind()[place], model.weights[name].read().t())


def test_dropped_parameters_are_those_that_nothing_reads() -> None:
    model = traced("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    model.add_parameter("unread", transpose(model.weights[name]), model.parameters()[name])
    before = set(model.weights.entries)
    assert model.drop_unused_parameters() == 1
    assert set(model.weights.entries) == before - {"unread"}
    assert "unread" not in model.program.state_dict
    assert signature_names(model) == placeholder_names(model)
    assert model.drop_unused_parameters() == 0


def test_user_inputs_are_kept_even_if_nothing_reads_them() -> None:
    # gpt2's mask, positions and states are read; bloom takes no positions, and the input stays for the contract.
    model = traced("bloom")
    assert not model.placeholders()["position_ids"].users
    model.drop_unused_parameters()
    model.finish_rewrite()
    assert "position_ids" in model.placeholders()


def test_signature_that_names_other_nodes_is_caught() -> None:
    model = traced("llama")
    model.program.graph_signature.input_specs.pop(0)
    with pytest.raises(AssertionError, match="inputs and signature differ"):
        model.finish_rewrite()


def test_output_without_a_name_is_caught() -> None:
    model = traced("llama")
    model.outputs = (*model.outputs, TensorSpec("more", "float32", ()))
    with pytest.raises(AssertionError, match="outputs and their names differ"):
        model.finish_rewrite()


def test_copy_is_independent_of_its_original() -> None:
    original = traced("llama")
    code, entries = str(original.graph), dict(original.weights.entries)
    names, outputs = signature_names(original), original.outputs
    copied = original.copy()
    attention = user_nodes(copied.graph.nodes, torch.ops.calque.attention.default)[0]
    copied.add_output(attention, TensorSpec("attention", "float32", ()))
    name = "model.layers.0.mlp.up_proj.weight"
    copied.add_parameter("more", transpose(copied.weights[name]), copied.parameters()[name])
    attention.args = (*attention.args[:4], 0.5, *attention.args[5:])
    copied.finish_rewrite()
    original.finish_rewrite()
    assert str(original.graph) == code
    assert original.weights.entries == entries
    assert signature_names(original) == names
    assert original.outputs == outputs
    assert "more" not in original.program.state_dict


def test_copy_has_a_call_signature_of_its_own() -> None:
    original = shared_trace("llama")
    copied = original.copy()
    before = original.program.module_call_graph[0].signature
    assert before is not None
    spec = before.out_spec
    copied.add_output(user_nodes(copied.graph.nodes, torch.ops.calque.cache_update.default)[0], TensorSpec("k", "float32", ()))
    signature = copied.program.module_call_graph[0].signature
    assert signature is not None
    assert signature.out_spec is not None
    assert signature.out_spec.num_leaves == 2
    assert before.out_spec is spec


def test_copy_shares_the_weights_themselves() -> None:
    original = traced("llama")
    copied = original.copy()
    assert all(copied.weights[name] is weight for name, weight in original.weights.entries.items())


def test_source_of_a_node_is_its_module_and_its_line() -> None:
    attention = user_nodes(traced("llama").graph.nodes, torch.ops.calque.attention.default)[1]
    module, line = source_of(attention)
    assert module == "model.layers.1.self_attn"
    assert line.startswith("File ")
    assert "semantic.py" in line or "modeling_llama.py" in line


def test_source_of_a_node_without_a_past_is_empty() -> None:
    graph = torch.fx.Graph()
    assert source_of(graph.placeholder("x")) == ("", "")
