from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calque.errors import ArtifactUnreadable, CalqueError, TargetUnavailable, Unsupported, UsageError
from calque.runtime.mil import OPERATORS, MilProgram, MilState, uncovered
from tests.runtime.mil_packages import assert_close, convert, ct, f32, i32, package, results, save, unwarned

X = f32([[1, -2, 3]])
LENGTH = 8


class Masked(torch.nn.Module):
    """Gives layers a mask like that of transformers' eager attention: added, and ``lowest`` where it is not allowed to look."""

    def __init__(self, lowest: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lowest = lowest

    def layers(self, ids: torch.Tensor, added: torch.Tensor) -> Any:
        raise NotImplementedError

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        allowed = torch.ones(1, 1, LENGTH, LENGTH).tril() * mask[:, None, None, :]
        return self.layers(ids, torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(allowed == 0, self.lowest))


class Attentions(Masked):
    """Two layers of attention and nothing else."""

    def __init__(self, lowest: float) -> None:
        super().__init__(lowest)
        self.embedding = torch.nn.Embedding(64, 16)
        self.projections = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(2))

    def layers(self, ids: torch.Tensor, added: torch.Tensor) -> Any:
        hidden = self.embedding(ids)[:, None]
        for projection in self.projections:
            query, key, value = projection(hidden).chunk(3, -1)
            hidden = hidden + ((query @ key.mT) * 0.25 + added).softmax(-1) @ value
        return hidden[:, 0]


class TinyLlama(Masked):
    """Two layers of Llama with eager attention."""

    def __init__(self, lowest: float) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__(lowest)
        sizes: Any = {
            "attn_implementation": "eager",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
        }
        self.model = LlamaModel(LlamaConfig(num_hidden_layers=2, **sizes))

    def layers(self, ids: torch.Tensor, added: torch.Tensor) -> Any:
        places = torch.arange(LENGTH)[None]
        return self.model(input_ids=ids, attention_mask=added, position_ids=places, use_cache=False).last_hidden_state


@pytest.mark.parametrize("model", [Attentions, pytest.param(TinyLlama, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("precision", "lowest", "tolerance"),
    [
        pytest.param("FLOAT32", torch.finfo(torch.float32).min, 1e-5, marks=pytest.mark.slow),
        ("FLOAT16", -1e4, 1e-2),
        ("FLOAT16", torch.finfo(torch.float32).min, None),
    ],
    ids=["float32", "float16", "float16 with the least float32 in its mask"],
)
def test_a_decoder_is_what_pytorch_says_or_shows_that_its_mask_overflowed(
    tmp_path: Path, model: type[Masked], precision: str, lowest: float, tolerance: float | None
) -> None:
    # coremltools 9.0 converts the last case without a word (its pull request #2669): the least float32 becomes -inf, and a
    # row that is padding has nothing else in it.
    decoder = model(lowest)
    ids = torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    whole, padded = torch.ones(1, LENGTH), (torch.arange(LENGTH) >= 3).float()[None]
    program = MilProgram(convert(decoder, (ids, whole), tmp_path / "decoder.mlpackage", precision))
    assert program.inputs == {"ids": ((1, LENGTH), np.dtype("int32")), "mask": ((1, LENGTH), np.dtype("float32"))}
    for mask in (whole, padded):
        with torch.no_grad():
            expected = decoder(ids, mask)
        found = program({"ids": ids.numpy(), "mask": mask.numpy()})["y"]
        if tolerance is None and mask is padded:
            assert np.isnan(found).all()
        else:
            assert_close(found[:, 3:], expected[:, 3:], tolerance or 1e-2)


def test_an_encoder_of_pictures_is_what_pytorch_says(tmp_path: Path) -> None:
    from torch import nn

    torch.manual_seed(0)
    shape: Any = {"kernel_size": 3, "padding": 1}
    normalised = nn.BatchNorm2d(8)
    normalised.running_mean = torch.rand(8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, **shape), normalised, nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, groups=8, **shape), nn.GroupNorm(2, 8),
        nn.AvgPool2d(2), nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, 10), nn.Softmax(-1),
    )  # fmt: skip
    picture = torch.randn(1, 3, 16, 16)
    path = convert(model, (picture,), tmp_path / "p.mlpackage")
    (found,) = MilProgram(path)({next(iter(MilProgram(path).inputs)): picture.numpy()}).values()
    assert_close(found, model(picture).detach(), 1e-5)


def stateful(path: Path, changes: bool = True, name: str = "main") -> Path:
    """Save a package that adds its input to a state, and gives the state as it was and is; or that gives it alone."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    specs = [mb.TensorSpec((1, 3), types.fp16), mb.StateTensorSpec((1, 3), types.fp16)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(x: Any, kept: Any) -> Any:
        before = mb.read_state(input=kept)
        if not changes:
            return mb.add(x=before, y=x, name="sum")
        after = mb.coreml_update_state(state=kept, value=mb.add(x=before, y=x))
        return mb.identity(x=before, name="before"), mb.mul(x=after, y=np.float16(1), name="after")

    return save(program, path)


def test_a_state_outlives_its_call_and_each_is_its_own(tmp_path: Path) -> None:
    program = MilProgram(stateful(tmp_path / "s.mlpackage"))
    assert program.inputs == {"x": ((1, 3), np.dtype("float16"))}
    first, second = program.new_state(), program.new_state()
    x = X.astype(np.float16)
    given = program({"x": x}, first)
    assert (given["before"].tolist(), given["after"].tolist()) == ([[0, 0, 0]], [[1, -2, 3]])
    given["after"][:] = 99
    x[:] = 1
    again = program({"x": x}, first)
    assert (again["before"].tolist(), again["after"].tolist()) == ([[1, -2, 3]], [[2, -1, 4]])
    assert program({"x": x}, second)["after"].tolist() == [[1, 1, 1]]
    held = MilProgram(tmp_path / "s.mlpackage", state=first)
    assert held({"x": x})["after"].tolist() == [[3, 0, 5]]


def test_a_stateful_program_without_its_state_is_refused(tmp_path: Path) -> None:
    program = MilProgram(stateful(tmp_path / "s.mlpackage"))
    with pytest.raises(UsageError, match="is stateful") as raised:
        program({"x": X})
    assert raised.value.where == ("kept",)
    with pytest.raises(UsageError, match="the state has no kept of"):
        program({"x": X}, MilState({"kept": np.zeros((1, 4), np.float16)}))


def test_functions_of_a_package_share_a_state(tmp_path: Path) -> None:
    described = ct.utils.MultiFunctionDescriptor()
    for name, changes in (("write", True), ("read", False)):
        described.add_function(str(stateful(tmp_path / f"{name}.mlpackage", changes)), "main", name)
    described.default_function_name = "write"
    with unwarned():
        ct.utils.save_multifunction(described, str(tmp_path / "both.mlpackage"))
    write, read = (MilProgram(tmp_path / "both.mlpackage", name) for name in ("write", "read"))
    assert (write.outputs, read.outputs) == (("before", "after"), ("sum",))
    state = write.new_state()
    write({"x": X}, state)
    assert read({"x": X}, state)["sum"].tolist() == [[2, -4, 6]]
    with pytest.raises(UsageError, match="has no function main"):
        uncovered(tmp_path / "both.mlpackage")


def test_branches_and_loops_run_their_blocks(tmp_path: Path) -> None:
    cases = {
        "branch": lambda mb, x, y: mb.cond(
            pred=mb.greater(x=mb.reduce_sum(x=x), y=0.0), _true_fn=lambda: mb.add(x=x, y=1.0), _false_fn=lambda: mb.mul(x=x, y=2.0)
        ),
        "loop": lambda mb, x, y: mb.while_loop(
            _cond=lambda value, count: mb.less(x=count, y=mb.squeeze(x=y)),
            _body=lambda value, count: (mb.add(x=value, y=x), mb.add(x=count, y=1)),
            loop_vars=(mb.mul(x=x, y=0.0), np.int32(0)),
        ),
    }
    path = package(tmp_path / "p.mlpackage", cases, X, i32([4]))
    for sign in (1, -1):
        found = results(path, X * sign, i32([4]))
        assert_close(found["branch"][0], X + 1 if sign == 1 else X * -2)
        assert_close(found["loop"][0], X * sign * 4)
        assert found["loop"][1].tolist() == 4


def test_every_operator_that_is_not_covered_is_named_before_anything_runs(tmp_path: Path) -> None:
    cases = {
        "noise": lambda mb, x: mb.random_normal(shape=[2], name="noise"),
        "fine": lambda mb, x: mb.relu(x=x),
        "boxes": lambda mb, x: mb.random_uniform(shape=[2], name="more_noise"),
    }
    path = package(tmp_path / "p.mlpackage", cases, X)
    assert uncovered(path) == ["random_normal noise", "random_uniform more_noise"]
    with pytest.raises(Unsupported, match="the MIL interpreter cannot run") as raised:
        MilProgram(path)
    assert raised.value.where == ("random_normal noise", "random_uniform more_noise")


def renamed(path: Path, old: bytes, new: bytes) -> Path:
    """Change a name of the same length in the program."""
    model = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    assert len(old) == len(new)
    assert old in model.read_bytes()
    model.write_bytes(model.read_bytes().replace(old, new))
    return path


def test_a_parameter_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = package(tmp_path / "p.mlpackage", {"y": lambda mb, x: mb.softmax(x=x, axis=-1, name="shares")}, X)
    # The name of an operator's parameter, in its map: 4 letters after their tag and length.
    assert uncovered(renamed(path, b"\x0a\x04axis", b"\x0a\x04axes")) == ["softmax shares: parameter axes"]


def test_a_result_of_another_shape_than_declared_is_refused(tmp_path: Path) -> None:
    # coremltools 9.0 declares what two scalars are selected of a scalar, whatever shape the condition has.
    cases = {"y": lambda mb, x: mb.mul(x=x, y=mb.select(cond=mb.greater(x=x, y=0.0), a=1.0, b=-1.0, name="chosen"))}
    program = MilProgram(package(tmp_path / "p.mlpackage", cases, X))
    with pytest.raises(Unsupported, match="select chosen has no result for these values") as raised:
        program({"x": X})
    assert "a result of shape (1, 3) where () is declared" in str(raised.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs an input x"),
        ({"x": X, "z": X}, "has no inputs of these names"),
        ({"x": X.astype(np.int32)}, "is of int32"),
        ({"x": X[0]}, r"has shape \(3,\)"),
        ({"x": np.zeros((1, 4), np.float32)}, r"has shape \(1, 4\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    program = MilProgram(package(tmp_path / "p.mlpackage", {"y": lambda mb, x: mb.relu(x=x)}, X))
    with pytest.raises(UsageError, match=said):
        program(given)


def test_whole_numbers_of_64_bits_are_taken_where_they_fit(tmp_path: Path) -> None:
    program = MilProgram(package(tmp_path / "p.mlpackage", {"y": lambda mb, x: mb.add(x=x, y=1)}, i32([1, 2])))
    assert program({"x": np.array([5, -6])})["y_0"].tolist() == [6, -5]
    with pytest.raises(UsageError, match="does not fit into int32"):
        program({"x": np.array([5, 2**31])})


def test_what_comes_out_may_be_changed(tmp_path: Path) -> None:
    weight = np.arange(3, dtype=np.float32).reshape(1, 3)
    cases = {"same": lambda mb, x: mb.identity(x=x), "weight": lambda mb, x: mb.identity(x=mb.const(val=weight))}
    path = package(tmp_path / "p.mlpackage", cases, X)
    program, x = MilProgram(path), X.copy()
    for value in program({"x": x}).values():
        value += 1
    assert x.tolist() == X.tolist()
    assert program({"x": x})["weight_0"].tolist() == weight.tolist()


def test_values_are_freed_after_their_last_use(tmp_path: Path) -> None:
    def chain(mb: Any, x: Any) -> Any:
        for _ in range(20):
            x = mb.add(x=x, y=1.0)
        return mb.reduce_max(x=x)

    x = np.zeros((256, 1024), np.float32)
    program = MilProgram(package(tmp_path / "p.mlpackage", {"y": chain}, x))
    tracemalloc.start()
    try:
        assert program({"x": x})["y_0"] == 20
        assert tracemalloc.get_traced_memory()[1] < 3.5 * x.nbytes
    finally:
        tracemalloc.stop()


def blocked(path: Path, *modules: str) -> subprocess.CompletedProcess[str]:
    """Run a package in a Python that cannot import these modules."""
    code = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
    code += "import numpy as np; from pathlib import Path; from calque.runtime.mil import MilProgram\n"
    code += f"program = MilProgram(Path({str(path)!r}))\n"
    code += "print(program({name: np.ones(shape, dtype) for name, (shape, dtype) in program.inputs.items()}))"
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_neither_coremltools_nor_pytorch_is_needed_where_nothing_is_convolved(tmp_path: Path) -> None:
    path = package(tmp_path / "p.mlpackage", {"y": lambda mb, x: mb.linear(x=x, weight=np.ones((2, 3), np.float32))}, X)
    ran = blocked(path, "coremltools", "torch")
    assert ran.stdout.strip() == "{'y_0': array([[3., 3.]], dtype=float32)}", ran.stderr
    picture = np.ones((1, 1, 2), np.float32)
    folded = package(tmp_path / "c.mlpackage", {"y": lambda mb, x: mb.conv(x=x, weight=picture)}, picture)
    ran = blocked(folded, "torch")
    assert f"{TargetUnavailable.__name__}: convolutions of MIL are computed by PyTorch" in ran.stderr


def test_the_operators_that_models_are_made_of_are_covered() -> None:
    needed = """const mul add linear reshape expand_dims select slice_by_index concat shape transpose tile real_div cast pow reduce_mean
    rsqrt matmul equal gather greater_equal logical_and softmax silu range_1d less_equal stack gather_nd cos sin sub read_state scatter
    write_state slice_update scaled_dot_product_attention layer_norm batch_norm instance_norm gelu conv conv_transpose max_pool avg_pool
    constexpr_blockwise_shift_scale constexpr_lut_to_dense constexpr_affine_dequantize constexpr_sparse_to_dense cond while_loop"""
    assert set(needed.split()) <= set(OPERATORS)
    assert "lstm" not in OPERATORS


def test_a_value_that_nothing_gives_is_found_before_anything_runs(tmp_path: Path) -> None:
    path = package(tmp_path / "p.mlpackage", {"y": lambda mb, x: mb.square(x=mb.relu(x=x, name="positive"))}, X)
    # Where the name is declared it is followed by its type, the second field.
    with pytest.raises(ArtifactUnreadable, match="reads values that nothing gives") as raised:
        MilProgram(renamed(path, b"\x0a\x08positive\x12", b"\x0a\x08negative\x12"))
    assert raised.value.where == ("positive",)


def test_any_damage_to_a_program_is_said_as_what_it_is(tmp_path: Path) -> None:
    path = package(tmp_path / "p.mlpackage", {"y": lambda mb, x: mb.softmax(x=mb.relu(x=x), axis=1)}, X)
    model = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    data, generator, refused = model.read_bytes(), np.random.default_rng(0), 0
    for place in generator.integers(0, len(data), 120):
        broken = bytearray(data)
        broken[place] ^= int(generator.integers(1, 256))
        model.write_bytes(broken)
        try:
            MilProgram(path)({"x": X})
        except CalqueError:
            refused += 1
    assert refused > 20
